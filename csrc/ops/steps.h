// Scales of two levels: the steps that blocks of groups share (docs/solver.md 6.4).
#pragma once

#include <algorithm>

#include "core/buffer.h"
#include "kernels/dispatch.h"
#include "ops/fit_options.h"

namespace bitwright {

// Blocks of groups in a row, 0 where scales have one level.
inline Index blocks_of(const FitSettings& s, Index groups) {
  return s.block == 0 ? 0 : ceil_div(groups, s.block);
}

inline void require_steps(const char* op, const FitSettings& s, Index n, Index groups,
                          In<float> steps) {
  require(s.block >= 0 && (s.block == 0 || (s.scale_bits >= 2 && s.scale_bits <= 8)), "[", op,
          "] two-level scales want a block of groups and 2 to 8 bits, got ", s.block, " and ",
          s.scale_bits);
  const Index columns = blocks_of(s, groups) * (s.grid.offset ? 2 : 1);
  require(steps.rows() == n && steps.cols() == columns, "[", op, "] steps must be ", n, " x ",
          columns, ", got ", steps.rows(), " x ", steps.cols());
  for (Index r = 0; r < n; ++r)
    for (Index b = 0; b < columns; ++b)
      require(steps(r, b) > 0.0F && steps(r, b) <= 0x1p100F, "[", op,
              "] steps must be positive and finite, got ", steps(r, b), " at (", r, ", ", b, ")");
}

// The steps of the rows of a panel, [block][nr] of scales, then of offsets; 1 past the end.
class PanelSteps {
 public:
  PanelSteps(In<float> steps, const FitSettings& s, Index row, Index nr = table().nr_f32)
      : nr_(nr),
        block_(s.block),
        blocks_(steps.cols() / (s.grid.offset ? 2 : 1)),
        offset_(s.grid.offset),
        values_(std::max<Index>(steps.cols(), 1) * nr_) {
    std::fill(values_.get(), values_ + std::max<Index>(steps.cols(), 1) * nr_, 1.0F);
    for (Index b = 0; b < steps.cols(); ++b)
      for (Index lane = 0; lane < std::min(nr_, steps.rows() - row); ++lane)
        values_[b * nr_ + lane] = steps(row + lane, b);
  }
  Index blocks() const { return blocks_; }
  float* scale(Index b) { return values_ + b * nr_; }
  float* offset(Index b) { return values_ + (blocks_ + b) * nr_; }

  // `options` as they are for group g.
  FitOptions at(const FitOptions& options, Index g) {
    FitOptions here = options;
    if (block_ > 0) here.step = scale(g / block_);
    if (block_ > 0 && offset_) here.offset_step = offset(g / block_);
    return here;
  }

 private:
  Index nr_, block_, blocks_;
  bool offset_;
  Buffer<float> values_;
};

}  // namespace bitwright
