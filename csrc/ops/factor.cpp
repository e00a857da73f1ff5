// H + damping = R R^T with R upper triangular: the lower Cholesky factor L of the reversed matrix,
// reversed again, R_ij = L_{k-1-i, k-1-j} (docs/solver.md 3.2). Left-looking in block columns: each
// block is updated once by all finished columns (tiles, one chain over ascending columns), its
// diagonal block is factored, the rows below are solved. Work is kept negated (-H + L L^T), because
// the tile adds. Lower triangle only, as row panels [column][nr] that end with their own block:
// k^2/2 doubles.
#include <vector>

#include "core/parallel.h"
#include "ops.h"
#include "ops/panel.h"

namespace bitwright {

namespace {

constexpr Index kPanelsPerBlock = 4;
constexpr Index kChain = 128;  // columns of a tile call: its right operand stays in L1

class Cholesky {
 public:
  explicit Cholesky(Index k)
      : k_(k),
        nr_(table().nr_f64),
        block_(kPanelsPerBlock * nr_),
        offsets_(panel_offsets()),
        work_(offsets_.back(), true),
        lower_(block_ * block_),
        columns_(block_ * block_, true) {}

  template <class At>
  void load(const At& at) {
    parallel_for(panels(), [&](Index panel) {
      for (Index c = 0; c < std::min(width(panel), k_); ++c)
        for (Index lane = 0; lane < nr_; ++lane) {
          const Index row = panel * nr_ + lane;
          if (row < k_ && c <= row) at_(panel, c)[lane] = -at(row, c);
        }
    });
  }

  bool run() {
    for (Index first = 0; first < k_; first += block_) {
      const Index panel0 = first / nr_;
      parallel_for(panels() - panel0, [&](Index i) { update(panel0 + i, first); });
      if (!factor_diagonal(first)) return false;
      const Index below = std::min(panels(), panel0 + kPanelsPerBlock);
      parallel_for(panels() - below, [&](Index i) {
        double* x = at_(below + i, first);
        for (Index e = 0; e < block_ * nr_; ++e) x[e] = -x[e];
        table().solve_lower_f64(block_, lower_.get(), x);
      });
    }
    return true;
  }

  double operator()(Index row, Index column) const {
    return work_[offsets_[std::size_t(row / nr_)] + column * nr_ + row % nr_];
  }

 private:
  Index panels() const { return ceil_div(k_, nr_); }
  Index width(Index panel) const { return (panel / kPanelsPerBlock + 1) * block_; }
  double* at_(Index panel, Index column) {
    return work_ + offsets_[std::size_t(panel)] + column * nr_;
  }

  std::vector<Index> panel_offsets() const {
    std::vector<Index> offsets(1, 0);
    for (Index p = 0; p < ceil_div(panels(), kPanelsPerBlock) * kPanelsPerBlock; ++p)
      offsets.push_back(offsets.back() + width(p) * nr_);
    return offsets;
  }

  // Subtracts from the block's columns of one panel what the finished columns contribute.
  void update(Index panel, Index first) {
    const Index mr = table().mr_f64;
    for (Index c = 0; c < first; c += kChain)
      for (Index j = 0; j < block_; j += mr) {
        const double* left = at_((first + j) / nr_, c) + j % nr_;
        table().tile_f64(std::min(kChain, first - c), left, nr_, at_(panel, c),
                         at_(panel, first + j), nr_);
      }
  }

  // The diagonal block, in place and into lower_; past the end of H the unit matrix.
  bool factor_diagonal(Index first) {
    for (Index i = 0; i < block_; ++i)
      for (Index j = 0; j <= i; ++j)
        columns_[j * block_ + i] = first + i < k_ ? -*place(first, i, j) : (i == j ? 1.0 : 0.0);
    bool positive = true;
    table().cholesky_f64(block_, columns_.get(), &positive);
    for (Index i = 0; i < block_; ++i)
      for (Index j = 0; j <= i; ++j)
        *place(first, i, j) = lower_[i * block_ + j] = columns_[j * block_ + i];
    return positive;
  }

  double* place(Index first, Index i, Index j) {
    return at_((first + i) / nr_, first + j) + (first + i) % nr_;
  }

  Index k_, nr_, block_;
  std::vector<Index> offsets_;
  Buffer<double> work_, lower_, columns_;
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
  Cholesky cholesky(k);
  cholesky.load([&](Index row, Index column) {
    const Index i = order[k - 1 - row], j = order[k - 1 - column];
    if (dead[i] || dead[j]) return row == column ? alone : 0.0;
    return h(i, j) + (row == column ? damping : 0.0);
  });
  if (!cholesky.run()) return false;
  parallel_for(k, [&](Index i) {
    for (Index j = 0; j < k; ++j)
      // + 0: the sign of a zero depends on the block that it went through
      r(i, j) = j < i ? 0.0F : static_cast<float>(cholesky(k - 1 - i, k - 1 - j)) + 0.0F;
  });
  return true;
}

}  // namespace bitwright
