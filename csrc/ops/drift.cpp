// Targets for drifted inputs (docs/solver.md 9): delta = W C (R R^T)^-1, columns in solving order,
// is the solution of x R R^T = W C: a product and two triangular solves. A solve x U = y with U
// upper triangular is the sweep without rounding: a starts as y, e_j = -a_j / U_jj, a_i += e_j
// U_ji, x = -e. The first one, v R^T = W C, becomes one by reversing the columns. Each result is
// one multiply-add chain over ascending columns: slices and threads change no bit.
//
// Memory beside the arguments: half of C's columns, then half of R, as slices in the same
// 2 k^2 bytes, and a few panels per thread; what is between the steps lies in delta.
#include <vector>

#include "core/parallel.h"
#include "ops.h"
#include "ops/sweep.h"

namespace bitwright {

namespace {

constexpr Index kBlock = 192;        // columns; a multiple of every mr
constexpr Index kColumns = 768;      // of C that share a panel's results; a multiple of every mr
constexpr Index kPanelsPerTask = 8;  // at most, that share left operands in cache

// An upper triangular matrix as the tiles read it, and the diagonal blocks of its slices.
class Triangle {
 public:
  template <class At>
  Triangle(Index k, const At& u, bool turned, float* room)
      : k_(k),
        mr_(table().mr_f32),
        blocks_(sweep_blocks(k, even_starts(k, kBlock), u, turned, room)),
        diagonal_(padded() * mr_) {
    for (Index p = 0; p < k; ++p) {
      const Index first = p / mr_ * mr_;
      for (Index j = 0; j < std::min(mr_, k - first); ++j)
        diagonal_[p * mr_ + j] = p <= first + j ? u(p, first + j) : 0.0F;
    }
  }

  static Index floats(Index k) {
    Index sum = 0;
    for (const Index first : even_starts(k, kBlock))
      sum += LeftSlices::floats(std::min(k, first + kBlock), std::min(kBlock, k - first));
    return sum;
  }

  // Columns of a panel: those past k are zero and stay so.
  Index padded() const { return ceil_div(k_, mr_) * mr_; }

  // a [panel][padded()][nr] becomes -x with x U = a.
  void solve(Index panels, float* a) const {
    const Index nr = table().nr_f32, stride = padded() * nr;
    Buffer<float> zero(mr_ * nr, true), loss(nr, true);
    for (const SweepBlock& block : blocks_) {
      multiply(
          block.left, block.first, panels, block.first,
          [&](Index panel) { return a + panel * stride; },
          [&](Index panel) { return a + panel * stride + block.first * nr; });
      for (Index panel = 0; panel < panels; ++panel)
        for (Index s = 0; s < block.left.slices(); ++s)
          solve_slice(block, s, a + panel * stride, zero.get(), loss.get());
    }
  }

 private:
  // What the block's earlier columns contribute to a slice, and the slice itself.
  void solve_slice(const SweepBlock& block, Index s, float* a, float* zero, float* loss) const {
    const Index nr = table().nr_f32, first = block.first + s * mr_;
    block.left.add(s, block.first, first, a + block.first * nr, a + first * nr);
    FeedbackBlock f{};
    f.columns = std::min(mr_, k_ - first);
    f.r = diagonal_ + first * mr_;
    f.ldr = mr_;
    f.w = zero;
    f.a = f.e = a + first * nr;
    f.open = true;
    f.loss = loss;
    table().feedback(f);
  }

  Index k_, mr_;
  std::vector<SweepBlock> blocks_;
  Buffer<float> diagonal_;
};

// Columns of C that are left operands at a time: about half of them.
Index columns_at_once(Index k) { return ceil_div(k, 2 * kColumns) * kColumns; }

// delta = W C + D, columns in solving order; room for k x columns_at_once.
void product(In<float> w, In<double> c, In<double> d, InVec<std::int32_t> order, float* room,
             Out<float> delta) {
  const Index n = w.rows(), k = w.cols(), nr = table().nr_f32, mr = table().mr_f32;
  const Index panels = ceil_div(n, nr), each = panels_of_task(panels, kPanelsPerTask);
  const Index half = columns_at_once(k);
  for (Index begin = 0; begin < k; begin += half) {
    std::vector<LeftSlices> cross;
    for (Index first = begin; first < std::min(k, begin + half); first += kColumns)
      cross.emplace_back(
          k, std::min(kColumns, k - first),
          [&](Index p, Index i) { return static_cast<float>(c(p, order[first + i])); }, false,
          room + (first - begin) * k);
    parallel_for(ceil_div(panels, each), [&](Index task) {
      const Index panel0 = task * each, count = std::min(each, panels - panel0);
      Buffer<float> in(count * k * nr), out(count * kColumns * nr);
      for (Index p = 0; p < count; ++p) load_panel(w, (panel0 + p) * nr, 0, k, in + p * k * nr);
      Index first = begin;
      for (const LeftSlices& part : cross) {
        const Index size = part.slices() * mr * nr, end = std::min(k, first + kColumns);
        std::fill(out.get(), out + count * size, 0.0F);
        multiply(
            part, k, count, k, [&](Index p) { return in + p * k * nr; },
            [&](Index p) { return out + p * size; });
        for (Index row = panel0 * nr; row < std::min(n, (panel0 + count) * nr); ++row) {
          const float* sum = out + (row / nr - panel0) * size + row % nr;
          for (Index i = first; i < end; ++i, sum += nr)
            delta(row, i) = d.size() > 0 ? *sum + static_cast<float>(d(row, order[i])) : *sum;
        }
        first = end;
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
  Buffer<float> room(
      std::max(LeftSlices::floats(k, std::min(k, columns_at_once(k))), Triangle::floats(k)));
  product(w, c, d, order, room.get(), delta);
  const auto solve = [&](const Triangle& u, bool reversed) {
    const Index each = panels_of_task(panels, kPanelsPerTask), stride = u.padded() * nr;
    parallel_for(ceil_div(panels, each), [&](Index task) {
      const Index panel0 = task * each, count = std::min(each, panels - panel0);
      Buffer<float> x(count * stride, true);
      const auto each_value = [&](const auto& f) {
        for (Index panel = 0; panel < count; ++panel) {
          const Index row = (panel0 + panel) * nr;
          float* values = x + panel * stride;
          const auto at = [&](Index lane, Index i) {
            return &delta(row + lane, reversed ? k - 1 - i : i);
          };
          each_turned(
              nr, std::min(nr, n - row), k,
              [&](Index lane, Index i, Index to) { f(*at(lane, i), values[to]); }, at);
        }
      };
      each_value([](float& from, float& to) { to = from; });
      u.solve(count, x.get());
      each_value([](float& to, float& from) { to = -from; });
    });
  };
  solve(Triangle(
            k, [&](Index p, Index i) { return r(k - 1 - i, k - 1 - p); }, true, room.get()),
        true);
  solve(Triangle(k, [&](Index p, Index i) { return r(p, i); }, false, room.get()), false);
  parallel_for(n, [&](Index row) {
    std::vector<float> ordered(delta.row(row).begin(), delta.row(row).end());
    for (Index i = 0; i < k; ++i) delta(row, order[i]) = ordered[static_cast<std::size_t>(i)];
  });
}

}  // namespace bitwright
