// Matrices in panels: packed and unpacked, multiplied exactly (as qlinear) and over int8
// activations (within their rounding), over every width, kind of zero point, odd shapes, few and
// many tokens.
#include <algorithm>
#include <cmath>
#include <limits>

#include "check.h"

namespace bitwright_tests {

namespace {

struct Kind {
  Grid grid;
  bool symmetric;
  const char* scale;
};

std::vector<Kind> kinds() {
  std::vector<Kind> found;
  for (int bits = 1; bits <= 8; ++bits) found.push_back({{bits, {}, {}}, bits % 2 == 0, "bf16"});
  found.push_back({{4, {}, {}, true}, false, "fp16"});
  found.push_back({{8, {}, {}, true}, false, "fp32"});
  const std::vector<float> levels = {-4, -1, -0.5F, 0, 0.5F, 1, 2, 4};
  const std::vector<float> middles = {-2.5F, -0.75F, -0.25F, 0.25F, 0.75F, 1.5F, 3};
  found.push_back({{3, levels, middles}, true, "fp32"});
  return found;
}

// Codes, scales and zero points that the kind can hold.
struct Matrix {
  RowMajor<std::uint8_t> codes;
  RowMajor<float> scales, zeros, values;

  Matrix(const Size& size, const Kind& kind)
      : codes(random_codes(size.n, size.k, kind.grid.bits, 8)),
        scales(random_codes(size.n, ceil_div(size.k, size.group), 7, 9).cast<float>()),
        zeros(random_codes(size.n, scales.cols(), kind.grid.bits, 10).cast<float>()),
        values(size.n, size.k) {
    scales.array() = (scales.array() + 1.0F) * 0x1p-9F;
    if (kind.grid.offset) zeros.array() *= 0x1p-5F;
    const int middle = kind.grid.levels.empty() ? 1 << (kind.grid.bits - 1) : 0;
    if (kind.symmetric) zeros.setConstant(static_cast<float>(middle));
    decode(codes, scales, zeros, size.group, kind.grid, values);
  }
};

RowMajor<std::uint8_t> packed(const Matrix& m, int bits, const PanelLayout& layout) {
  RowMajor<std::uint8_t> panels(ceil_div(m.codes.rows(), kPanelRows), layout.bytes);
  pack_linear(m.codes, m.scales, m.zeros, bits, layout, panels);
  return panels;
}

// The same from packed codes.
RowMajor<std::uint8_t> packed_words(const Matrix& m, int bits, const PanelLayout& layout) {
  RowMajor<std::uint32_t> words(m.codes.rows(), ceil_div(m.codes.cols() * bits, 32));
  pack(m.codes, bits, words);
  RowMajor<std::uint8_t> panels(ceil_div(m.codes.rows(), kPanelRows), layout.bytes);
  panels.setConstant(0xEE);
  pack_linear_u32(words, m.scales, m.zeros, bits, layout, panels);
  return panels;
}

RowMajor<float> product(const RowMajor<float>& x, const std::vector<const Packed*>& weights,
                        bool fast, bool per_token) {
  Vector<float> y(x.rows() * weights[0]->n);
  linear_f32(x, weights, fast, per_token, y);
  return Eigen::Map<RowMajor<float>>(y.data(), x.rows(), weights[0]->n);
}

void multiply(const Matrix& m, const Packed& w, Index t) {
  const RowMajor<float> x = normal(t, m.codes.cols(), 11);
  const RowMajor<double> size = x.cast<double>().cwiseAbs().rowwise().sum() *
                                m.values.cast<double>().cwiseAbs().rowwise().maxCoeff().transpose();
  const RowMajor<double> want = x.cast<double>() * m.values.cast<double>().transpose();
  const RowMajor<float> exact =
      for_every_thread_count([&] { return product(x, {&w}, false, false); });
  const double chain = 2.0 * static_cast<double>(m.codes.cols() + 1) * 0x1p-24;
  CHECK(((exact.cast<double>() - want).array().abs() <= chain * size.array() + 1e-30).all());
  const double largest = t == 0 ? 0.0 : static_cast<double>(x.cwiseAbs().maxCoeff());
  const Vector<double> rows = m.values.cast<double>().cwiseAbs().rowwise().sum();
  for (const bool per_token : {false, true}) {
    const RowMajor<float> fast =
        for_every_thread_count([&] { return product(x, {&w}, true, per_token); });
    const RowMajor<double> error = (fast.cast<double>() - want).cwiseAbs();
    const RowMajor<double> limit =
        (rows * (largest / 254.0)).transpose().replicate(t, 1) * 1.01 + size * 1e-3;
    CHECK((error.array() <= limit.array() + 1e-6).all());
  }
}

void packed_of(const Size& size, const Kind& kind) {
  const Matrix m(size, kind);
  const PanelLayout layout =
      panel_layout(kind.grid, size.k, size.group, kind.symmetric, kind.scale);
  const RowMajor<std::uint8_t> panels =
      for_every_thread_count([&] { return packed(m, kind.grid.bits, layout); });
  CHECK(for_every_thread_count([&] { return packed_words(m, kind.grid.bits, layout); }) == panels);
  RowMajor<std::uint8_t> codes(size.n, size.k);
  RowMajor<float> scales(size.n, m.scales.cols()), zeros(size.n, m.scales.cols());
  unpack_linear(panels, layout, codes, scales, zeros);
  CHECK(codes == m.codes && scales == m.scales && zeros == m.zeros);
  const Packed w(panels, size.n, layout);
  for (const Index t : {0, 1, 2, 3, 4, 5, 13, 17, 32}) multiply(m, w, t);
}

void refusals() {
  const Kind kind{{4, {}, {}}, true, "bf16"};
  const Size size{20, 70, 32};
  Matrix m(size, kind);
  const PanelLayout layout = panel_layout(kind.grid, size.k, size.group, true, "bf16");
  const auto refuse = [&] { return refusal([&] { packed(m, 4, layout); }); };
  CHECK(refuse().empty());
  m.codes(3, 5) = 16;
  CHECK(contains(refuse(), "codes must fit in 4 bits"));
  m.codes(3, 5) = 15;
  m.scales(4, 1) = std::numeric_limits<float>::quiet_NaN();
  CHECK(contains(refuse(), "scales must be bf16 numbers, got nan at (4, 1)"));
  m.scales(4, 1) = 1.0F;
  m.zeros(4, 1) = 7.0F;
  CHECK(contains(refuse(), "zeros must all be 8 in a symmetric scheme, got 7"));
  m.zeros(4, 1) = 8.0F;
  const RowMajor<std::uint8_t> panels = packed(m, 4, layout);
  CHECK(contains(refusal([&] { packed_words(m, 5, layout); }),
                 "words must be 20 x 11 for rows of 70 codes of 5 bits, 4 at most, got 20 x 11"));
  m.scales(17, 2) = 1.0F + 0x1p-10F;
  CHECK(contains(refusal([&] { packed_words(m, 4, layout); }),
                 "scales must be bf16 numbers, got 1.00098 at (17, 2)"));
  m.scales(17, 2) = 1.0F;
  const RowMajor<std::uint8_t> narrow = panels.leftCols(64);
  CHECK(contains(refusal([&] { Packed(narrow, 20, layout); }), "panels must be 2 x "));
  const Packed w(panels, 20, layout);
  CHECK(contains(refusal([&] { product(normal(3, 69, 1), {&w}, false, false); }),
                 "X must be t x 70 to match W (20 x 70), got 3 x 69"));
  CHECK(contains(refusal([&] { panel_layout(kind.grid, 70, 71, true, "bf16"); }), "group must be"));
  CHECK(contains(refusal([&] { panel_layout(kind.grid, 70, 7, true, "e8m0"); }), "got e8m0"));
}

}  // namespace

void packed() {
  for (const Kind& kind : kinds()) {
    for (const Size& size : kSizes) packed_of({size.n, size.k, std::min(size.group, size.k)}, kind);
    packed_of({37, 300, 300}, kind);
    packed_of({33, 300, 8}, kind);
    packed_of({17, 700, 48}, kind);
  }
  refusals();
}

}  // namespace bitwright_tests
