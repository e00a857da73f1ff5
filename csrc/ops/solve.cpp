// Inverse-free GPTQ, blocked (solver.md 3.3). R is sliced once as left operand of the tiles; a task
// takes two row panels through all columns, so R's slices serve both from cache. For each block of
// 48 columns: A = E R over the finished columns (tiles), then the feedback kernel inside the block.
// Each target is one multiply-add chain over ascending columns: block size and threads change no
// bit.
#include <vector>

#include "core/parallel.h"
#include "ops.h"
#include "ops/panel.h"

namespace bitwright {

namespace {

constexpr Index kBlock = 48;  // a multiple of every mr
constexpr Index kPanelsPerTask = 2;

// Block b of R as left operand: its columns' rows above the block, slices of mr columns.
std::vector<LeftSlices> slice(In<float> r) {
  std::vector<LeftSlices> blocks;
  for (Index b0 = 0; b0 < r.cols(); b0 += kBlock)
    blocks.emplace_back(b0, std::min(kBlock, r.cols() - b0),
                        [&](Index p, Index i) { return r(p, b0 + i); });
  return blocks;
}

class PanelSweep {
 public:
  PanelSweep(In<float> w, In<float> scales, In<std::uint8_t> zeros, Index row, Index k)
      : nr_(table().nr_f32),
        row_(row),
        rows_(std::min(nr_, w.rows() - row)),
        groups_(scales.cols()),
        error_(k * nr_),
        scale_(groups_ * nr_),
        zero_(groups_ * nr_, true),
        w_(kBlock * nr_, true),
        a_(kBlock * nr_),
        codes_(kBlock * nr_),
        loss_(nr_, true) {
    for (Index g = 0; g < groups_; ++g)
      for (Index lane = 0; lane < nr_; ++lane) {
        scale_[g * nr_ + lane] = lane < rows_ ? scales(row + lane, g) : 1.0F;
        zero_[g * nr_ + lane] = lane < rows_ ? static_cast<float>(zeros(row + lane, g)) : 0.0F;
      }
  }

  void block(In<float> w, In<float> r, const LeftSlices& left, InVec<std::int32_t> order, Index b0,
             Index group, int bits, Out<std::uint8_t> codes) {
    const Index columns = std::min(kBlock, r.cols() - b0), mr = left.mr();
    const float* scale[kBlock];
    const float* zero[kBlock];
    for (Index p = 0; p < columns; ++p) {
      const Index column = order[b0 + p];
      scale[p] = scale_ + column / group * nr_;
      zero[p] = zero_ + column / group * nr_;
      for (Index lane = 0; lane < rows_; ++lane) w_[p * nr_ + lane] = w(row_ + lane, column);
    }
    std::memset(a_.get(), 0, static_cast<std::size_t>(kBlock * nr_) * sizeof(float));
    for (Index s = 0; s < left.slices(); ++s)
      table().tile_f32(b0, left.slice(s), mr, error_.get(), a_ + s * mr * nr_, nr_);
    FeedbackBlock f{};
    f.columns = columns;
    f.r = r.data() + b0 * r.outerStride() + b0;
    f.ldr = r.outerStride();
    f.w = w_.get();
    f.a = a_.get();
    f.e = error_ + b0 * nr_;
    f.scale = scale;
    f.zero = zero;
    f.max_code = static_cast<float>((1 << bits) - 1);
    f.codes = codes_.get();
    f.loss = loss_.get();
    table().feedback(f);
    for (Index p = 0; p < columns; ++p)
      for (Index lane = 0; lane < rows_; ++lane)
        codes(row_ + lane, order[b0 + p]) = static_cast<std::uint8_t>(codes_[p * nr_ + lane]);
  }

  void finish(OutVec<double> loss) const {
    for (Index lane = 0; lane < rows_; ++lane) loss[row_ + lane] = loss_[lane];
  }

 private:
  Index nr_, row_, rows_, groups_;
  Buffer<float> error_, scale_, zero_, w_, a_;
  Buffer<std::int32_t> codes_;
  Buffer<double> loss_;
};

void check(In<float> w, In<float> r, InVec<std::int32_t> order, int bits, Out<std::uint8_t> codes,
           OutVec<double> loss) {
  const Index n = w.rows(), k = w.cols();
  require(r.rows() == k && r.cols() == k, "[gptq] R must be ", k, " x ", k, " to match W (", n,
          " x ", k, "), got ", r.rows(), " x ", r.cols());
  require_permutation("gptq", k, order);
  require_finite("gptq", "W", w);
  require_finite("gptq", "R", r);
  require(bits >= 1 && bits <= 8, "[gptq] bits must be 1 to 8, got ", bits);
  require(codes.rows() == n && codes.cols() == k, "[gptq] codes must be ", n, " x ", k, ", got ",
          codes.rows(), " x ", codes.cols());
  require(loss.size() == n, "[gptq] loss must have ", n, " entries, got ", loss.size());
  for (Index i = 0; i < k; ++i)
    require(r(i, i) > 0.0F, "[gptq] R must have a positive diagonal, got ", r(i, i), " at ", i);
}

}  // namespace

void gptq(In<float> w, In<float> r, InVec<std::int32_t> order, In<float> scales,
          In<std::uint8_t> zeros, Index group, int bits, Out<std::uint8_t> codes,
          OutVec<double> loss) {
  const Index n = w.rows(), k = w.cols(), nr = table().nr_f32;
  require_codes("gptq", n, k, group, scales, zeros);
  require_scales("gptq", scales);
  check(w, r, order, bits, codes, loss);
  const std::vector<LeftSlices> left = slice(r);
  parallel_for(ceil_div(n, nr * kPanelsPerTask), [&](Index task) {
    std::vector<PanelSweep> panels;
    const Index end = std::min(n, (task + 1) * nr * kPanelsPerTask);
    for (Index row = task * nr * kPanelsPerTask; row < end; row += nr)
      panels.emplace_back(w, scales, zeros, row, k);
    for (Index b0 = 0, b = 0; b0 < k; b0 += kBlock, ++b)
      for (PanelSweep& panel : panels)
        panel.block(w, r, left[std::size_t(b)], order, b0, group, bits, codes);
    for (const PanelSweep& panel : panels) panel.finish(loss);
  });
}

}  // namespace bitwright
