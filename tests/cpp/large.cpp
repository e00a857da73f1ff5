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

}  // namespace

void large() {
  far_codes();
  far_solve();
}

}  // namespace bitwright_tests
