// Index arithmetic beyond 2^32 elements, without the memory: rows that lie 2^27 elements apart in
// pages that the system backs only where they are touched. Every op gives what it gives on compact
// copies.
#include <sys/mman.h>

#include <numeric>

#include "check.h"

namespace bitwright_tests {

namespace {

constexpr Index kApart = Index{1} << 27, kRows = 50, kColumns = 24;
static_assert((kRows - 1) * kApart > Index{1} << 32);

template <class T>
using FarMap = Eigen::Map<RowMajor<T>, 0, Eigen::OuterStride<>>;

// kRows rows far apart.
template <class T>
class Far {
 public:
  explicit Far(const RowMajor<T>& compact)
      : at_(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)),
        columns_(compact.cols()) {
    if (at_ == MAP_FAILED) throw std::runtime_error("no address space for rows far apart");
    for (Index r = 0; r < compact.rows(); ++r) view().row(r) = compact.row(r);
  }
  Far(const Far&) = delete;
  Far& operator=(const Far&) = delete;
  ~Far() { munmap(at_, kBytes); }
  FarMap<T> view() { return {static_cast<T*>(at_), kRows, columns_, Eigen::OuterStride<>(kApart)}; }

 private:
  static constexpr std::size_t kBytes = std::size_t{kRows} * std::size_t{kApart} * sizeof(T);
  void* at_;
  Index columns_;
};

template <class T>
RowMajor<T> zeros(Index columns) {
  return RowMajor<T>::Zero(kRows, columns);
}

template <class T>
bool same(Far<T>& far, const RowMajor<T>& compact) {
  return RowMajor<T>(far.view()) == compact;
}

void far_codes() {
  RowMajor<std::uint8_t> codes = random_codes(kRows, kColumns, 4, 1);
  RowMajor<std::uint32_t> words = zeros<std::uint32_t>(kColumns / 8);
  pack(codes, 4, words);
  Far<std::uint8_t> far(codes);
  Far<std::uint32_t> packed(zeros<std::uint32_t>(kColumns / 8));
  pack(far.view(), 4, packed.view());
  CHECK(same(packed, words));
  Far<std::uint8_t> back(zeros<std::uint8_t>(kColumns));
  unpack(packed.view(), 4, back.view());
  CHECK(same(back, codes));
  const RowMajor<float> scales = RowMajor<float>::Constant(kRows, 1, 0.5F),
                        middle = RowMajor<float>::Constant(kRows, 1, 8.0F);
  RowMajor<float> w = zeros<float>(kColumns);
  decode(codes, scales, middle, kColumns, Grid{}, w);
  Far<float> far_w(zeros<float>(kColumns));
  decode(far.view(), scales, middle, kColumns, Grid{}, far_w.view());
  CHECK(same(far_w, w));
}

void far_solve() {
  const RowMajor<float> x = normal(kRows, kRows, 2), w = normal(kRows, kRows, 3);
  RowMajor<double> h = zeros<double>(kRows);
  gram_f32(x, h);
  mirror(h);
  Far<float> far_x(x), far_w(w);
  Far<double> far_h(zeros<double>(kRows));
  gram_f32(far_x.view(), far_h.view());
  mirror(far_h.view());
  CHECK(same(far_h, h));
  CHECK(quadratic(far_w.view(), far_h.view()) == quadratic(w, h));
  Vector<std::int32_t> order(kRows);
  std::iota(order.data(), order.data() + kRows, 0);
  const Vector<std::uint8_t> dead = Vector<std::uint8_t>::Zero(kRows);
  RowMajor<float> r = zeros<float>(kRows), delta = zeros<float>(kRows);
  Far<float> far_r(r), far_delta(delta);
  CHECK(factor(h, order, dead, 1.0, r) && factor(far_h.view(), order, dead, 1.0, far_r.view()));
  CHECK(same(far_r, r));
  drift(w, h, RowMajor<double>(0, 0), r, order, delta);
  drift(far_w.view(), far_h.view(), RowMajor<double>(0, 0), far_r.view(), order, far_delta.view());
  CHECK(same(far_delta, delta));
  const RowMajor<float> scales = RowMajor<float>::Constant(kRows, 1, 0.5F),
                        middle = RowMajor<float>::Constant(kRows, 1, 8.0F);
  RowMajor<std::uint8_t> codes = zeros<std::uint8_t>(kRows);
  Far<std::uint8_t> far(codes);
  Vector<double> loss(kRows), far_loss(kRows);
  gptq(w, r, order, scales, middle, kRows, Grid{}, codes, loss);
  gptq(far_w.view(), far_r.view(), order, scales, middle, kRows, Grid{}, far.view(), far_loss);
  CHECK(same(far, codes) && far_loss == loss);
}

// What the default effort adds: drift's sums, the search and the refinement.
void far_search() {
  const RowMajor<float> x = normal(kRows, kRows, 2), y = normal(kRows, kRows, 4),
                        w = normal(kRows, kRows, 3);
  RowMajor<double> c = zeros<double>(kRows);
  Far<double> far_c(c);
  Far<float> far_x(x), far_y(y), far_w(w);
  cross_f32(y, x, x, c);
  cross_f32(far_y.view(), far_x.view(), far_x.view(), far_c.view());
  CHECK(same(far_c, c));
  const RowMajor<double> h = hessian(kRows, 5);
  Vector<std::int32_t> order = reversed(kRows);
  const Vector<std::uint8_t> dead = Vector<std::uint8_t>::Zero(kRows);
  RowMajor<float> r = zeros<float>(kRows), steps(kRows, 0);
  CHECK(factor(h, order, dead, 1.0, r));
  FitSettings settings;
  settings.group = 25;
  settings.symmetric = false;
  settings.search = true;
  Vector<float> factors(3);
  factors << 1.0F, 0.8F, 0.6F;
  RowMajor<float> scales = zeros<float>(2), offsets = zeros<float>(2);
  RowMajor<std::uint8_t> codes = zeros<std::uint8_t>(kRows);
  Vector<double> loss(kRows), far_loss(kRows);
  gptq_search(w, r, order, settings, factors, steps, scales, offsets, codes, loss);
  Far<double> far_h(h);
  Far<float> far_r(r), far_scales(zeros<float>(2)), far_offsets(zeros<float>(2));
  Far<std::uint8_t> far(zeros<std::uint8_t>(kRows));
  gptq_search(far_w.view(), far_r.view(), order, settings, factors, steps, far_scales.view(),
              far_offsets.view(), far.view(), far_loss);
  CHECK(same(far, codes) && same(far_scales, scales) && same(far_offsets, offsets));
  CHECK(far_loss == loss);
  refine(w, h, dead, 0.01, settings, "clc", 1e-4, steps, scales, offsets, codes, loss);
  refine(far_w.view(), far_h.view(), dead, 0.01, settings, "clc", 1e-4, steps, far_scales.view(),
         far_offsets.view(), far.view(), far_loss);
  CHECK(same(far, codes) && same(far_scales, scales) && far_loss == loss);
}

// A matrix of packed weights, from bytes and from words, and tokens far apart.
void far_products() {
  const RowMajor<std::uint8_t> codes = random_codes(kRows, kColumns, 4, 1);
  const RowMajor<float> scales = RowMajor<float>::Constant(kRows, 1, 0.5F),
                        middle = RowMajor<float>::Constant(kRows, 1, 8.0F),
                        x = normal(kRows, kColumns, 6);
  RowMajor<std::uint32_t> words = zeros<std::uint32_t>(kColumns / 8);
  pack(codes, 4, words);
  Far<std::uint8_t> far(codes);
  Far<std::uint32_t> far_words(words);
  Far<float> far_scales(scales), far_middle(middle), far_x(x);
  const PanelLayout layout = panel_layout(Grid{}, kColumns, kColumns, true, "fp32");
  RowMajor<std::uint8_t> panels(ceil_div(kRows, kPanelRows), layout.bytes), other = panels;
  pack_linear(codes, scales, middle, 4, layout, panels);
  pack_linear(far.view(), far_scales.view(), far_middle.view(), 4, layout, other);
  CHECK(other == panels);
  other.setZero();
  pack_linear_u32(far_words.view(), far_scales.view(), far_middle.view(), 4, layout, other);
  CHECK(other == panels);
  const Packed packed(panels, kRows, layout);
  Vector<float> y(kRows * kRows), far_y(kRows * kRows);
  for (const bool fast : {false, true}) {
    linear_f32(x, {&packed}, fast, false, y);
    linear_f32(far_x.view(), {&packed}, fast, false, far_y);
    CHECK(far_y == y);
  }
}

}  // namespace

void large() {
  far_codes();
  far_solve();
  far_search();
  far_products();
}

}  // namespace bitwright_tests
