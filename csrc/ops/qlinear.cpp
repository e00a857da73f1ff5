// A QTensor times activations: panels of rows are decoded into the right operand of the tiles, the
// tokens are the left one. Exact mode only (float32 throughout): meant for evaluation.
#include "core/parallel.h"
#include "ops.h"
#include "ops/panel.h"

namespace bitwright {

void qlinear(In<float> x, In<std::uint8_t> codes, In<float> scales, In<float> zeros, Index group,
             Out<float> y) {
  const Index t = x.rows(), n = codes.rows(), k = codes.cols();
  require_codes("qlinear", n, k, group, scales, zeros);
  require(x.cols() == k, "[qlinear] x must be t x ", k, " to match codes (", n, " x ", k, "), got ",
          t, " x ", x.cols());
  require(y.rows() == t && y.cols() == n, "[qlinear] y must be ", t, " x ", n, ", got ", y.rows(),
          " x ", y.cols());
  const Index nr = table().nr_f32, mr = table().mr_f32;
  const LeftSlices left(k, t, [&](Index p, Index i) { return x(i, p); }, true);
  parallel_for(ceil_div(n, nr), [&](Index panel) {
    const Index row = panel * nr, rows = std::min(nr, n - row);
    Buffer<float> weights(k * nr, true), c(mr * nr);
    for (Index lane = 0; lane < rows; ++lane)
      for (Index p = 0; p < k; ++p)
        weights[p * nr + lane] =
            (static_cast<float>(codes(row + lane, p)) - zeros(row + lane, p / group)) *
            scales(row + lane, p / group);
    for (Index s = 0; s < left.slices(); ++s) {
      std::fill(c.get(), c + mr * nr, 0.0F);
      left.add(s, 0, k, weights.get(), c.get());
      for (Index i = 0; i < std::min(mr, t - s * mr); ++i)
        for (Index lane = 0; lane < rows; ++lane) y(s * mr + i, row + lane) = c[i * nr + lane];
    }
  });
}

}  // namespace bitwright
