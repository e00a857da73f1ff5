// The only file that knows Python: one line per op. Inputs are taken as they are (noconvert:
// bitwright.ops prepares them in plain sight), outputs are the caller's arrays, the GIL is
// released.
#include <pybind11/eigen.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/parallel.h"
#include "kernels/dispatch.h"
#include "ops.h"

namespace py = pybind11;
using namespace bitwright;
using py::arg;

namespace {

using Free = py::call_guard<py::gil_scoped_release>;

py::arg as_is(const char* name) { return py::arg(name).noconvert(); }

// Refused input is bitwright.InputError, a ValueError, as where Python refuses it.
void translate(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const std::invalid_argument& refused) {
    py::set_error(py::module_::import("bitwright.spec").attr("InputError"), refused.what());
  }
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() =
      "The C++ ops of bitwright; csrc/ops.h is their reference, bitwright.ops their only user.";

  py::register_local_exception_translator(&translate);

  py::class_<Grid>(m, "Grid").def(py::init<int, std::vector<float>, std::vector<float>, bool>(),
                                  arg("bits"), arg("levels"), arg("middles"), arg("offset"));
  py::class_<FitSettings>(m, "FitSettings")
      .def(py::init<Grid, Index, bool, int, std::string, float, double, bool, int, bool, Index,
                    int>(),
           arg("grid"), arg("group"), arg("symmetric"), arg("zero_min"), arg("scale_grid"),
           arg("global_scale"), arg("power"), arg("search"), arg("zero_span"), arg("negative"),
           arg("block"), arg("scale_bits"));
  py::class_<PanelLayout>(m, "PanelLayout")
      .def(py::init(&panel_layout), arg("grid"), arg("k"), arg("group"), arg("symmetric"),
           arg("scale"))
      .def_readonly("bytes", &PanelLayout::bytes);
  py::class_<Packed>(m, "Packed")
      .def(py::init<In<std::uint8_t>, Index, const PanelLayout&>(), as_is("panels"), arg("n"),
           arg("layout"), py::keep_alive<1, 2>());

  py::class_<BlockSettings>(m, "BlockSettings")
      .def(py::init<Index, Index, float, float, bool, bool, bool>(), arg("heads"), arg("kv_heads"),
           arg("epsilon"), arg("scale"), arg("rotary"), arg("fast"), arg("per_token"));
  py::class_<Block>(m, "Block")
      .def(py::init<const std::vector<const Packed*>&, InVec<float>, InVec<float>,
                    const BlockSettings&>(),
           arg("matrices"), as_is("gains"), as_is("biases"), arg("settings"),
           py::keep_alive<1, 3>(), py::keep_alive<1, 4>());
  py::class_<KeyValues<float>>(m, "KeyValuesF32")
      .def(py::init<Out<float>, Out<float>>(), as_is("keys"), as_is("values"),
           py::keep_alive<1, 2>(), py::keep_alive<1, 3>());
  py::class_<KeyValues<std::uint16_t>>(m, "KeyValuesU16")
      .def(py::init<Out<std::uint16_t>, Out<std::uint16_t>>(), as_is("keys"), as_is("values"),
           py::keep_alive<1, 2>(), py::keep_alive<1, 3>());

  m.def("isa", [] { return std::string(table().isa); });
  m.def("levels", &levels);
  m.def("multiplies_bf16", [] { return table().tile_bf16 != nullptr; });
  m.def("threads", [] { return thread_count().load(); });
  m.def(
      "panel_rows", [](Index rows) { return table_of(rows, thread_count()).nr_f32; }, arg("rows"));
  m.def("set_threads", [](int n) { thread_count().store(n); }, arg("n"));

  m.def("pack", &pack, as_is("codes"), arg("bits"), as_is("words"), Free());
  m.def("unpack", &unpack, as_is("words"), arg("bits"), as_is("codes"), Free());
  m.def("fit", &fit, as_is("w"), as_is("weight"), arg("settings"), as_is("factors"), as_is("steps"),
        as_is("scales"), as_is("zeros"), Free());
  m.def("encode", &encode, as_is("w"), as_is("scales"), as_is("zeros"), arg("group"), arg("grid"),
        as_is("codes"), Free());
  m.def("decode", &decode, as_is("codes"), as_is("scales"), as_is("zeros"), arg("group"),
        arg("grid"), as_is("w"), Free());
  m.def("round_pack_f32", &round_pack_f32, as_is("w"), arg("settings"), as_is("scales"),
        as_is("zeros"), as_is("words"), Free());
  m.def("round_pack_u16", &round_pack_u16, as_is("w"), arg("bf16"), arg("settings"),
        as_is("scales"), as_is("zeros"), as_is("words"), Free());
  m.def("gram_f32", &gram_f32, as_is("x"), as_is("h"), Free());
  m.def("gram_u16", &gram_u16, as_is("x"), arg("bf16"), arg("pairs"), as_is("h"), Free());
  m.def("cross_f32", &cross_f32, as_is("before"), as_is("after"), as_is("x"), as_is("c"), Free());
  m.def("cross_u16", &cross_u16, as_is("before"), as_is("after"), as_is("x"), arg("bf16"),
        arg("pairs"), as_is("c"), Free());
  m.def("mirror", &mirror, as_is("h"), Free());
  m.def("column_stats_f32", &column_stats_f32, as_is("x"), as_is("absolute"), as_is("abs_max"),
        as_is("minimum"), as_is("maximum"), Free());
  m.def("column_stats_u16", &column_stats_u16, as_is("x"), arg("bf16"), as_is("absolute"),
        as_is("abs_max"), as_is("minimum"), as_is("maximum"), Free());
  m.def("factor", &factor, as_is("h"), as_is("order"), as_is("dead"), arg("damping"), as_is("r"),
        Free());
  m.def("gptq", &gptq, as_is("w"), as_is("r"), as_is("order"), as_is("scales"), as_is("zeros"),
        arg("group"), arg("grid"), as_is("codes"), as_is("loss"), Free());
  m.def("gptq_search", &gptq_search, as_is("w"), as_is("r"), as_is("order"), arg("settings"),
        as_is("factors"), as_is("steps"), as_is("scales"), as_is("zeros"), as_is("codes"),
        as_is("loss"), Free());
  m.def("refine", &refine, as_is("w"), as_is("h"), as_is("dead"), arg("damping"), arg("settings"),
        arg("pattern"), arg("tolerance"), as_is("steps"), as_is("scales"), as_is("zeros"),
        as_is("codes"), as_is("loss"), Free());
  m.def("drift", &drift, as_is("w"), as_is("c"), as_is("d"), as_is("r"), as_is("order"),
        as_is("delta"), Free());
  m.def("quadratic", &quadratic, as_is("e"), as_is("h"), Free());
  m.def("awq_scale", &awq_scale, as_is("w"), as_is("h"), as_is("column_scales"), arg("settings"),
        as_is("losses"), Free());
  m.def("awq_clip", &awq_clip, as_is("w"), as_is("h"), arg("settings"), as_is("factors"),
        as_is("scales"), as_is("zeros"), Free());
  m.def("qlinear", &qlinear, as_is("x"), as_is("codes"), as_is("scales"), as_is("zeros"),
        arg("group"), as_is("y"), Free());
  m.def("pack_linear", &pack_linear, as_is("codes"), as_is("scales"), as_is("zeros"), arg("bits"),
        arg("layout"), as_is("panels"), Free());
  m.def("pack_linear_u32", &pack_linear_u32, as_is("words"), as_is("scales"), as_is("zeros"),
        arg("bits"), arg("layout"), as_is("panels"), Free());
  m.def("unpack_linear", &unpack_linear, as_is("panels"), arg("layout"), as_is("codes"),
        as_is("scales"), as_is("zeros"), Free());
  m.def("linear_f32", &linear_f32, as_is("x"), arg("weights"), arg("fast"), arg("per_token"),
        as_is("y"), Free());
  m.def("linear_u16", &linear_u16, as_is("x"), arg("weights"), arg("fast"), arg("per_token"),
        as_is("y"), Free());
  m.def("blocks_f32", &blocks_f32, as_is("x"), arg("blocks"), as_is("cos"), as_is("sin"),
        as_is("mask"), arg("stores"), arg("batch"), arg("past"), as_is("y"), Free());
  m.def("blocks_u16", &blocks_u16, as_is("x"), arg("blocks"), as_is("cos"), as_is("sin"),
        as_is("mask"), arg("stores"), arg("batch"), arg("past"), as_is("y"), Free());
  m.def("head_f32", &head_f32, as_is("x"), as_is("w"), as_is("y"), Free());
  m.def("head_u16", &head_u16, as_is("x"), as_is("w"), as_is("y"), Free());
  m.def("chain_f32", &chain_f32, arg("rounds"), arg("a"), arg("b"), as_is("x"), Free());
  m.def("chain_f64", &chain_f64, arg("rounds"), arg("a"), arg("b"), as_is("x"), Free());
  m.def("chain_bf16", &chain_bf16, arg("rounds"), arg("a"), arg("b"), as_is("x"), Free());
  m.def("dot_chain", &dot_chain, arg("rounds"), arg("code"), arg("byte"), as_is("x"), Free());
  m.def("word_sum", &word_sum, as_is("x"), as_is("sums"), Free());
}
