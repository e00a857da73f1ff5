// The head of a model for a few tokens: its rows are read once, a few of them a task.
#include <type_traits>

#include "ops.h"
#include "ops/panel.h"

namespace bitwright {

namespace {

constexpr Index kTaskWords = 1 << 17;  // of weights: they stay in L2 while the tokens pass

template <class T>
void run(In<T> x, In<std::uint16_t> w, Out<T> y) {
  const Index t = x.rows(), k = x.cols(), n = w.rows();
  require(w.outerStride() == w.cols(), "[head] W must be contiguous");
  require(w.cols() == k, "[head] X must be t x ", w.cols(), " to match W (", n, " x ", w.cols(),
          "), got ", t, " x ", k);
  require(y.rows() == t && y.cols() == n, "[head] y must be ", t, " x ", n, ", got ", y.rows(),
          " x ", y.cols());
  if (w.size() == 0) {
    y.setZero();
    return;
  }
  Buffer<float> wide(t * k);
  for (Index i = 0; i < t; ++i) {
    const T* row = x.data() + i * x.outerStride();
    if constexpr (std::is_same_v<T, float>)
      std::copy(row, row + k, wide + i * k);
    else
      table().widen_bf16(k, row, wide + i * k);
  }
  const Index each = std::max<Index>(16, kTaskWords / k / 16 * 16);
  parallel_for(ceil_div(n, each), [&](Index task) {
    const Index first = task * each, rows = std::min(each, n - first);
    Buffer<float> out(rows);
    for (Index i = 0; i < t; ++i) {
      table().dot_rows(rows, k, wide + i * k, w.data() + first * w.outerStride(), out.get());
      T* to = y.data() + i * y.outerStride() + first;
      if constexpr (std::is_same_v<T, float>)
        std::copy(out.get(), out + rows, to);
      else
        table().narrow_bf16(rows, out.get(), to);
    }
  });
}

}  // namespace

void head_f32(In<float> x, In<std::uint16_t> w, Out<float> y) { run<float>(x, w, y); }

void head_u16(In<std::uint16_t> x, In<std::uint16_t> w, Out<std::uint16_t> y) {
  run<std::uint16_t>(x, w, y);
}

}  // namespace bitwright
