// Targets for drifted inputs (docs/solver.md 9): delta = W C (R R^T)^-1, columns in solving order,
// is the solution of x R R^T = W C: a product and two triangular solves. A solve x U = y with U
// upper triangular is the sweep without rounding: a starts as y, e_j = -a_j / U_jj, a_i += e_j
// U_ji, x = -e. The first one, v R^T = W C, becomes one by reversing the columns. Each result is
// one multiply-add chain over ascending columns: slices and threads change no bit.
//
// Memory beside the arguments: half of R as slices (2 k^2 bytes), a part of C's columns, and a
// panel per thread; what is between the steps lies in delta.
#include <vector>

#include "core/parallel.h"
#include "ops.h"
#include "ops/sweep.h"

namespace bitwright {

namespace {

constexpr Index kBlock = 48;         // a multiple of every mr
constexpr Index kColumns = 768;      // of C that are left operands at a time
constexpr Index kPanelsPerTask = 2;  // that share them

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

// delta = W C + D, columns in solving order.
void product(In<float> w, In<double> c, In<double> d, InVec<std::int32_t> order, Out<float> delta) {
  const Index n = w.rows(), k = w.cols(), nr = table().nr_f32, mr = table().mr_f32;
  const Index panels = ceil_div(n, nr);
  for (Index begin = 0; begin < k; begin += kColumns) {
    const Index end = std::min(k, begin + kColumns);
    const LeftSlices cross(k, end - begin, [&](Index p, Index i) {
      return static_cast<float>(c(p, order[begin + i]));
    });
    const Index padded = cross.slices() * mr;
    parallel_for(ceil_div(panels, kPanelsPerTask), [&](Index task) {
      const Index panel0 = task * kPanelsPerTask, count = std::min(kPanelsPerTask, panels - panel0);
      Buffer<float> in(count * k * nr), out(count * padded * nr, true);
      for (Index p = 0; p < count; ++p) load_panel(w, (panel0 + p) * nr, 0, k, in + p * k * nr);
      multiply(cross, false, k, count, in.get(), out.get());
      for (Index row = panel0 * nr; row < std::min(n, (panel0 + count) * nr); ++row) {
        const float* sum = out + (row / nr - panel0) * padded * nr + row % nr;
        for (Index i = begin; i < end; ++i, sum += nr)
          delta(row, i) = d.size() > 0 ? *sum + static_cast<float>(d(row, order[i])) : *sum;
      }
    });
  }
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
  product(w, c, d, order, delta);
  const auto solve = [&](const Triangle& u, bool reversed) {
    parallel_for(panels, [&](Index panel) {
      const Index first = panel * nr, rows = std::min(nr, n - first);
      Buffer<float> x(k * nr, rows < nr);
      const auto column = [&](Index i) { return reversed ? k - 1 - i : i; };
      const auto each = [&](const auto& f) {
        for (Index begin = 0; begin < k; begin += kTurned)
          for (Index lane = 0; lane < rows; ++lane)
            for (Index i = begin; i < std::min(k, begin + kTurned); ++i)
              f(delta(first + lane, column(i)), x[i * nr + lane]);
      };
      each([](float& from, float& to) { to = from; });
      u.solve(x.get());
      each([](float& to, float& from) { to = -from; });
    });
  };
  solve(Triangle(k, [&](Index p, Index i) { return r(k - 1 - i, k - 1 - p); }), true);
  solve(Triangle(k, [&](Index p, Index i) { return r(p, i); }), false);
  parallel_for(n, [&](Index row) {
    std::vector<float> ordered(delta.row(row).begin(), delta.row(row).end());
    for (Index i = 0; i < k; ++i) delta(row, order[i]) = ordered[static_cast<std::size_t>(i)];
  });
}

}  // namespace bitwright
