// Targets for drifted inputs (docs/solver.md 9): delta = W C (R R^T)^-1, columns in solving order,
// is the solution of x R R^T = W C: a product and two triangular solves. A solve x U = y with U
// upper triangular is the sweep without rounding: a starts as y, e_j = -a_j / U_jj, a_i += e_j
// U_ji, x = -e. The first one, v R^T = W C, becomes one by reversing the columns. Each result is
// one multiply-add chain over ascending columns: slices and threads change no bit.
#include <vector>

#include "core/parallel.h"
#include "ops.h"
#include "ops/sweep.h"

namespace bitwright {

namespace {

constexpr Index kBlock = 48;  // a multiple of every mr

// An upper triangular matrix as the tiles read it, and the diagonal blocks of its slices.
class Triangle {
 public:
  template <class At>
  Triangle(Index k, const At& u)
      : k_(k),
        mr_(table().mr_f32),
        blocks_(sweep_blocks(k, even_starts(k, kBlock), u)),
        diagonal_(ceil_div(k, mr_) * mr_ * mr_) {
    for (Index p = 0; p < k; ++p) {
      const Index first = p / mr_ * mr_;
      for (Index j = 0; j < std::min(mr_, k - first); ++j)
        diagonal_[p * mr_ + j] = p <= first + j ? u(p, first + j) : 0.0F;
    }
  }

  // a [k][nr] becomes -x with x U = a.
  void solve(float* a) const {
    const Index nr = table().nr_f32;
    Buffer<float> zero(mr_ * nr, true), loss(nr, true), slice(mr_ * nr);
    for (const SweepBlock& block : blocks_)
      for (Index s = 0; s < block.left.slices(); ++s) {
        const Index first = block.first + s * mr_, columns = std::min(mr_, k_ - first);
        std::copy(a + first * nr, a + (first + columns) * nr, slice.get());
        table().tile_f32(first, block.left.slice(s), mr_, a, slice.get(), nr);
        FeedbackBlock f{};
        f.columns = columns;
        f.r = diagonal_ + first * mr_;
        f.ldr = mr_;
        f.w = zero.get();
        f.a = slice.get();
        f.e = a + first * nr;
        f.open = true;
        f.loss = loss.get();
        table().feedback(f);
      }
  }

 private:
  Index k_, mr_;
  std::vector<SweepBlock> blocks_;
  Buffer<float> diagonal_;
};

// work = W C + D, columns in descending solving order.
void product(In<float> w, In<double> c, In<double> d, InVec<std::int32_t> order,
             Buffer<float>& work) {
  const Index k = w.cols(), nr = table().nr_f32;
  const LeftSlices cross(
      k, k, [&](Index p, Index i) { return static_cast<float>(c(p, order[k - 1 - i])); });
  const Index mr = cross.mr();
  parallel_for(ceil_div(w.rows(), nr), [&](Index panel) {
    Buffer<float> in(k * nr), tile(mr * nr);
    load_panel(w, panel * nr, 0, k, in.get());
    for (Index s = 0; s < cross.slices(); ++s) {
      std::memset(tile.get(), 0, static_cast<std::size_t>(mr * nr) * sizeof(float));
      table().tile_f32(k, cross.slice(s), mr, in.get(), tile.get(), nr);
      const Index first = s * mr, columns = std::min(mr, k - first);
      for (Index i = 0; i < columns && d.size() > 0; ++i)
        for (Index lane = 0; lane < std::min(nr, d.rows() - panel * nr); ++lane)
          tile[i * nr + lane] += static_cast<float>(d(panel * nr + lane, order[k - 1 - first - i]));
      std::copy(tile.get(), tile + columns * nr, work + (panel * k + first) * nr);
    }
  });
}

}  // namespace

void drift(In<float> w, In<double> c, In<double> d, In<float> r, InVec<std::int32_t> order,
           Out<float> delta) {
  const Index n = w.rows(), k = w.cols(), nr = table().nr_f32, panels = ceil_div(n, nr);
  require_square("drift", k, c);
  require(r.rows() == k && r.cols() == k, "[drift] R must be ", k, " x ", k, ", got ", r.rows(),
          " x ", r.cols());
  require(delta.rows() == n && delta.cols() == k, "[drift] delta must be ", n, " x ", k, ", got ",
          delta.rows(), " x ", delta.cols());
  require(d.size() == 0 || (d.rows() == n && d.cols() == k), "[drift] D must be ", n, " x ", k,
          ", got ", d.rows(), " x ", d.cols());
  require_permutation("drift", k, order);
  require_finite("drift", "W", w);
  require_finite("drift", "C", c);
  require_finite("drift", "D", d);
  require_finite("drift", "R", r);
  for (Index i = 0; i < k; ++i)
    require(r(i, i) > 0.0F, "[drift] R must have a positive diagonal, got ", r(i, i), " at ", i);
  Buffer<float> work(panels * k * nr);
  product(w, c, d, order, work);
  {
    const Triangle turned(k, [&](Index p, Index i) { return r(k - 1 - i, k - 1 - p); });
    parallel_for(panels, [&](Index panel) { turned.solve(work + panel * k * nr); });
  }
  const Triangle straight(k, [&](Index p, Index i) { return r(p, i); });
  parallel_for(panels, [&](Index panel) {
    Buffer<float> x(k * nr);
    const float* v = work + panel * k * nr;
    for (Index i = 0; i < k; ++i)
      for (Index lane = 0; lane < nr; ++lane) x[i * nr + lane] = -v[(k - 1 - i) * nr + lane];
    straight.solve(x.get());
    for (Index lane = 0; lane < std::min(nr, n - panel * nr); ++lane)
      for (Index i = 0; i < k; ++i) delta(panel * nr + lane, order[i]) = -x[i * nr + lane];
  });
}

}  // namespace bitwright
