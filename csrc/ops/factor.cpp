// H + damping = R R^T with R upper triangular: the lower Cholesky factor L of the reversed matrix,
// reversed again, R_ij = L_{k-1-i, k-1-j} (docs/solver.md 3.2). Left-looking in block columns: each
// block is updated once by all finished columns (tiles, one chain over ascending columns), its
// diagonal block is factored panel by panel, the rows below are solved. Work is kept negated
// (-H + L L^T), because the tile adds. Lower triangle only, as row panels [column][nr] that end
// with their own rows: k^2/2 doubles.
//
// A part of the block's rows of L stays in L2 while the panels pass, a part of one panel in L1; the
// next one's is fetched meanwhile, for each is used once per block.
#include <algorithm>
#include <vector>

#include "core/parallel.h"
#include "ops.h"
#include "ops/panel.h"

namespace bitwright {

namespace {

constexpr Index kPanelsPerBlock = 8;
constexpr Index kPanelsPerTask = 16;  // at most: their columns of the block stay in L2
constexpr Index kAtOnce = 8;          // rows loaded, a cache line of each column
constexpr Index kLine = 8;            // doubles

class Cholesky {
 public:
  explicit Cholesky(Index k)
      : k_(k),
        nr_(table().nr_f64),
        block_(kPanelsPerBlock * nr_),
        offsets_(panel_offsets()),
        work_(offsets_.back()) {}

  // row(i, to) writes row i of -A, to[c] for c <= i. Past the end of A lies the unit matrix.
  template <class Row>
  void load(const Row& row) {
    parallel_for(panels(), [&](Index panel) {
      const Index columns = (panel + 1) * nr_, stride = columns + kAtOnce;
      Buffer<double> rows(kAtOnce * stride, true);
      for (Index lane = 0; lane < nr_; lane += kAtOnce) {
        const Index count = std::min(kAtOnce, nr_ - lane);
        for (Index i = 0; i < count; ++i) {
          const Index here = panel * nr_ + lane + i;
          double* to = rows + i * stride;
          if (here < k_) {
            row(here, to);
          } else {
            std::fill(to, to + here, 0.0);
            to[here] = -1.0;
          }
        }
        double* to = at_(panel, 0) + lane;
        for (Index c = 0; c < columns; ++c, to += nr_)
          for (Index i = 0; i < count; ++i) to[i] = rows[i * stride + c];
      }
    });
  }

  bool run() {
    for (Index first = 0; first < k_; first += block_) {
      const Index panel0 = first / nr_, below = std::min(panels(), panel0 + kPanelsPerBlock);
      for_panels(panel0, [&](Index begin, Index end) { update(begin, end, first); });
      if (!factor_diagonal(panel0, below)) return false;
      for_panels(below, [&](Index begin, Index end) {
        for (Index panel = begin; panel < end; ++panel)
          for (Index p = panel0; p < below; ++p) finish(panel, p, first);
      });
    }
    return true;
  }

  // Row i of L backwards from to(i) on: its column c <= i to to(i)[-c].
  template <class To>
  void store(const To& to) {
    parallel_for(panels(), [&](Index panel) {
      const Index row = panel * nr_, rows = std::min(nr_, k_ - row);
      for (Index first = 0; first < row + rows; first += kTurned)
        for (Index lane = 0; lane < rows; ++lane) {
          const Index end = std::min(first + kTurned, row + lane + 1);
          const double* from = at_(panel, first) + lane;
          float* out = to(row + lane);
          // + 0: the sign of a zero depends on the block that it went through
          for (Index c = first; c < end; ++c, from += nr_)
            out[-c] = static_cast<float>(*from) + 0.0F;
        }
    });
  }

 private:
  Index panels() const { return ceil_div(k_, nr_); }
  double* at_(Index panel, Index column) {
    return work_ + offsets_[std::size_t(panel)] + column * nr_;
  }

  std::vector<Index> panel_offsets() const {
    std::vector<Index> offsets(1, 0);
    for (Index p = 0; p < panels(); ++p) offsets.push_back(offsets.back() + (p + 1) * nr_ * nr_);
    return offsets;
  }

  // f(begin, end) for parts of the panels from `first` on.
  template <class F>
  void for_panels(Index first, const F& f) {
    const Index size = panels_of_task(panels() - first, kPanelsPerTask);
    parallel_for(ceil_div(panels() - first, size), [&](Index task) {
      const Index begin = first + task * size;
      f(begin, std::min(panels(), begin + size));
    });
  }

  // Adds to columns [first, first + columns) of one panel the products with columns [from, to), and
  // fetches as many from `next` on.
  void add(Index panel, Index from, Index to, Index first, Index columns,
           const double* next = nullptr) {
    const Index mr = table().mr_f64;
    const Index ahead = next == nullptr ? 0 : ceil_div((to - from) * nr_, columns / mr);
    for (Index j = first; j < first + columns; j += mr, next += ahead) {
      for (Index i = 0; i < ahead; i += kLine) __builtin_prefetch(next + i, 0, 2);
      table().tile_f64(to - from, at_(j / nr_, from) + j % nr_, nr_, at_(panel, from),
                       at_(panel, j), nr_);
    }
  }

  // What the finished columns contribute to a block's, a chain after the other for all panels.
  void update(Index begin, Index end, Index first) {
    const Index chain = chain_columns();
    for (Index c = 0; c < first; c += chain)
      for (Index panel = begin; panel < end; ++panel) {
        const bool last = panel + 1 == end;
        add(panel, c, std::min(c + chain, first), first,
            std::min(block_, (panel + 1) * nr_ - first),
            at_(last ? begin : panel + 1, last ? std::min(c + chain, first) : c));
      }
  }

  // The columns of panel p's own rows, in one panel below: what the block contributes, and solved.
  void finish(Index panel, Index p, Index first) {
    add(panel, first, p * nr_, p * nr_, nr_);
    table().solve_lower_f64(at_(p, p * nr_), at_(panel, p * nr_));
  }

  bool factor_diagonal(Index begin, Index end) {
    bool positive = true;
    for (Index p = begin; p < end && positive; ++p) {
      add(p, begin * nr_, p * nr_, p * nr_, nr_);
      table().cholesky_f64(at_(p, p * nr_), &positive);
      for (Index panel = p + 1; panel < end; ++panel) finish(panel, p, begin * nr_);
    }
    return positive;
  }

  Index k_, nr_, block_;
  std::vector<Index> offsets_;
  Buffer<double> work_;
};

}  // namespace

bool factor(In<double> h, InVec<std::int32_t> order, InVec<std::uint8_t> dead, double damping,
            Out<float> r) {
  const Index k = h.rows();
  require_square("factor", k, h);
  require_permutation("factor", k, order);
  require(dead.size() == k, "[factor] dead must have ", k, " entries, got ", dead.size());
  require(r.rows() == k && r.cols() == k, "[factor] R must be ", k, " x ", k, ", got ", r.rows(),
          " x ", r.cols());
  require_finite("factor", "H", h);
  const double alone = damping > 0.0 ? damping : 1.0;
  std::vector<Index> gone;  // columns in the order of the work
  for (Index c = 0; c < k; ++c)
    if (dead[order[k - 1 - c]]) gone.push_back(c);
  Cholesky cholesky(k);
  cholesky.load([&](Index row, double* to) {
    const std::int32_t* column = order.data() + k - 1;
    const Index i = column[-row];
    to[row] = dead[i] ? -alone : -(h(i, i) + damping);
    if (dead[i]) return std::fill(to, to + row, 0.0);
    const double* from = h.data() + i * h.outerStride();
    for (Index c = 0; c < row; ++c) to[c] = -from[column[-c]];
    for (const Index c : gone)
      if (c < row) to[c] = 0.0;
  });
  if (!cholesky.run()) return false;
  parallel_for(k, [&](Index i) { std::fill_n(&r(i, 0), i, 0.0F); });
  cholesky.store([&](Index row) { return &r(k - 1 - row, k - 1); });
  return true;
}

}  // namespace bitwright
