// Targets for drifted inputs (solver.md 9): delta = W C (R R^T)^-1, columns in solving order, is
// the solution of x R R^T = W C: a product and two triangular solves. A solve x U = y with U upper
// triangular is the sweep without rounding: a starts as y, e_j = -a_j / U_jj, a_i += e_j U_ji, x =
// -e. The first one, v R^T = W C, becomes one by reversing the columns. Each result is one
// multiply-add chain over ascending columns: slices and threads change no bit.
#include "core/parallel.h"
#include "ops.h"
#include "ops/panel.h"

namespace bitwright {

namespace {

class Triangle {
 public:
  explicit Triangle(RowMajor<float> u)
      : u_(std::move(u)), left_(u_.rows(), u_.cols(), [&](Index p, Index i) { return u_(p, i); }) {}

  // a [k][nr] becomes -x with x U = a.
  void solve(float* a) const {
    const Index k = u_.rows(), nr = table().nr_f32, mr = left_.mr();
    Buffer<float> zero(mr * nr, true), loss(nr, true), slice(mr * nr);
    for (Index s = 0; s < left_.slices(); ++s) {
      const Index first = s * mr, columns = std::min(mr, k - first);
      std::copy(a + first * nr, a + (first + columns) * nr, slice.get());
      table().tile_f32(first, left_.slice(s), mr, a, slice.get(), nr);
      FeedbackBlock f{};
      f.columns = columns;
      f.r = u_.data() + first * u_.outerStride() + first;
      f.ldr = u_.outerStride();
      f.w = zero.get();
      f.a = slice.get();
      f.e = a + first * nr;
      f.open = true;
      f.loss = loss.get();
      table().feedback(f);
    }
  }

 private:
  RowMajor<float> u_;
  LeftSlices left_;
};

}  // namespace

void drift(In<float> w, In<double> c, In<float> r, InVec<std::int32_t> order, Out<float> delta) {
  const Index n = w.rows(), k = w.cols(), nr = table().nr_f32;
  require_square("drift", k, c);
  require(r.rows() == k && r.cols() == k, "[drift] R must be ", k, " x ", k, ", got ", r.rows(),
          " x ", r.cols());
  require(delta.rows() == n && delta.cols() == k, "[drift] delta must be ", n, " x ", k, ", got ",
          delta.rows(), " x ", delta.cols());
  require_permutation("drift", k, order);
  require_finite("drift", "W", w);
  require_finite("drift", "C", c);
  require_finite("drift", "R", r);
  for (Index i = 0; i < k; ++i)
    require(r(i, i) > 0.0F, "[drift] R must have a positive diagonal, got ", r(i, i), " at ", i);
  const LeftSlices cross(
      k, k, [&](Index p, Index i) { return static_cast<float>(c(p, order[k - 1 - i])); });
  const Triangle turned(r.transpose().reverse()), straight(r);
  parallel_for(ceil_div(n, nr), [&](Index panel) {
    Buffer<float> in(k * nr), y(cross.slices() * cross.mr() * nr, true), x(k * nr);
    load_panel(w, panel * nr, 0, k, in.get());
    for (Index s = 0; s < cross.slices(); ++s)
      table().tile_f32(k, cross.slice(s), cross.mr(), in.get(), y + s * cross.mr() * nr, nr);
    turned.solve(y.get());
    for (Index i = 0; i < k; ++i)
      for (Index lane = 0; lane < nr; ++lane) x[i * nr + lane] = -y[(k - 1 - i) * nr + lane];
    straight.solve(x.get());
    for (Index lane = 0; lane < std::min(nr, n - panel * nr); ++lane)
      for (Index i = 0; i < k; ++i) delta(panel * nr + lane, order[i]) = -x[i * nr + lane];
  });
}

}  // namespace bitwright
