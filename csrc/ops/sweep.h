// A panel of rows on its way through the columns in solving order (docs/solver.md 3.3): what the
// sweep with given scales and the sweep that searches them share.
//
// R is cut into blocks of consecutive columns, and each block into slices of mr columns with all
// rows above them: the left operands of the tiles. For a block: a = E R over the finished columns
// (tiles), then slice by slice inside the block: tiles over the block's earlier columns, and the
// feedback kernel inside the slice. Each target is one multiply-add chain over ascending columns,
// so blocks, slices and threads change no bit.
#pragma once

#include <vector>

#include "ops/fit_options.h"
#include "ops/panel.h"

namespace bitwright {

struct SweepBlock {
  Index first, columns;
  LeftSlices left;  // rows 0 .. first + columns of R
};

// r(p, i): entries of an upper triangular k x k matrix; starts: first columns of the blocks; room,
// turned, kernels: of LeftSlices, for all blocks.
template <class At>
std::vector<SweepBlock> sweep_blocks(Index k, const std::vector<Index>& starts, const At& r,
                                     bool turned = false, float* room = nullptr,
                                     const Table& kernels = table()) {
  std::vector<SweepBlock> blocks;
  for (std::size_t b = 0; b < starts.size(); ++b) {
    const Index first = starts[b], end = b + 1 < starts.size() ? starts[b + 1] : k;
    const auto at = [&](Index p, Index i) { return r(p, first + i); };
    blocks.push_back({first, end - first, LeftSlices(end, end - first, at, turned, room, kernels)});
    if (room != nullptr) room += LeftSlices::floats(end, end - first, kernels);
  }
  return blocks;
}

inline std::vector<Index> even_starts(Index k, Index block) {
  std::vector<Index> starts;
  for (Index b = 0; b < k; b += block) starts.push_back(b);
  return starts;
}

class SweepPanel {
 public:
  SweepPanel(In<float> w, In<float> r, InVec<std::int32_t> order, Index row, Index widest,
             const Table& kernels)
      : kernels_(kernels),
        nr_(kernels.nr_f32),
        row_(row),
        rows_(std::min(nr_, w.rows() - row)),
        w_in_(w),
        r_(r),
        order_(order),
        error_(r.cols() * nr_),
        w_(widest * nr_, true),
        a_((widest + kernels.mr_f32) * nr_),
        slice_(kernels.mr_f32 * nr_),
        codes_(widest * nr_),
        block_loss_(nr_),
        loss_(nr_, true) {}

  Index row() const { return row_; }
  Index rows() const { return rows_; }
  Index nr() const { return nr_; }
  const float* w() const { return w_.get(); }
  float* error(Index column) { return error_ + column * nr_; }
  const float* block_loss() const { return block_loss_.get(); }

  // Loads the weights of a block; its targets are still without what the finished columns
  // contribute.
  void enter(const SweepBlock& block) {
    for (Index lane = 0; lane < rows_; ++lane)
      for (Index p = 0; p < block.columns; ++p)
        w_[p * nr_ + lane] = w_in_(row_ + lane, order_[block.first + p]);
    std::fill(a_.get(), a_ + block.left.slices() * block.left.mr() * nr_, 0.0F);
  }
  float* targets() { return a_.get(); }

  // The block's feedback with these scales and zero points per column (unused where open): errors
  // to e, codes and losses inside. After each slice `go_on` may end it.
  template <class GoOn>
  void run(const SweepBlock& block, const float* const* scale, const float* const* zero,
           const Coding& coding, bool open, float* e, const GoOn& go_on) {
    const Index mr = block.left.mr();
    std::memset(block_loss_.get(), 0, static_cast<std::size_t>(nr_) * sizeof(float));
    for (Index s = 0; s < block.left.slices(); ++s) {
      const Index c = s * mr, columns = std::min(mr, block.columns - c);
      std::copy(a_ + c * nr_, a_ + (c + columns) * nr_, slice_.get());
      block.left.add(s, block.first, block.first + c, e, slice_.get());
      FeedbackBlock f{};
      f.columns = columns;
      f.r = r_.data() + (block.first + c) * r_.outerStride() + block.first + c;
      f.ldr = r_.outerStride();
      f.w = w_ + c * nr_;
      f.a = slice_.get();
      f.e = e + c * nr_;
      f.scale = scale + c;
      f.zero = zero + c;
      f.coding = coding;
      f.open = open;
      f.codes = codes_ + c * nr_;
      f.loss = block_loss_.get();
      kernels_.feedback(f);
      if (!go_on()) return;
    }
  }

  // Keeps the codes and losses of the last run.
  void commit(const SweepBlock& block, Out<std::uint8_t> codes) {
    for (Index lane = 0; lane < rows_; ++lane)
      for (Index p = 0; p < block.columns; ++p)
        codes(row_ + lane, order_[block.first + p]) =
            static_cast<std::uint8_t>(codes_[p * nr_ + lane]);
    for (Index lane = 0; lane < nr_; ++lane) loss_[lane] += static_cast<double>(block_loss_[lane]);
  }

  void finish(OutVec<double> loss) const {
    for (Index lane = 0; lane < rows_; ++lane) loss[row_ + lane] = loss_[lane];
  }

 private:
  const Table& kernels_;
  Index nr_, row_, rows_;
  In<float> w_in_, r_;
  InVec<std::int32_t> order_;
  Buffer<float> error_, w_, a_, slice_;
  Buffer<std::int32_t> codes_;
  Buffer<float> block_loss_;
  Buffer<double> loss_;
};

// Block after block for the panels of a task, so that R's slices serve them from cache.
template <class Make, class Step>
void sweep(Index n, Index nr, const std::vector<SweepBlock>& blocks, OutVec<double> loss,
           const Make& make, const Step& step) {
  constexpr Index kPanelsPerTask = 4;
  const Index each = panels_of_task(ceil_div(n, nr), kPanelsPerTask);
  parallel_for(ceil_div(n, nr * each), [&](Index task) {
    std::vector<decltype(make(Index{0}))> panels;
    const Index end = std::min(n, (task + 1) * nr * each);
    for (Index row = task * nr * each; row < end; row += nr) panels.push_back(make(row));
    const auto sweep_of = [&](Index i) -> SweepPanel& { return panels[std::size_t(i)].sweep; };
    for (const SweepBlock& block : blocks) {
      for (auto& panel : panels) panel.sweep.enter(block);
      multiply(
          block.left, block.first, Index(panels.size()), block.first,
          [&](Index i) { return sweep_of(i).error(0); },
          [&](Index i) { return sweep_of(i).targets(); });
      for (auto& panel : panels) step(panel, block);
    }
    for (const auto& panel : panels) panel.sweep.finish(loss);
  });
}

inline void require_sweep(const char* op, In<float> w, In<float> r, InVec<std::int32_t> order,
                          const Grid& grid, Out<std::uint8_t> codes, OutVec<double> loss) {
  const Index n = w.rows(), k = w.cols();
  require(r.rows() == k && r.cols() == k, "[", op, "] R must be ", k, " x ", k, " to match W (", n,
          " x ", k, "), got ", r.rows(), " x ", r.cols());
  require_permutation(op, k, order);
  require_finite(op, "W", w);
  require_finite(op, "R", r);
  require_grid(op, grid);
  require(codes.rows() == n && codes.cols() == k, "[", op, "] codes must be ", n, " x ", k,
          ", got ", codes.rows(), " x ", codes.cols());
  require(loss.size() == n, "[", op, "] loss must have ", n, " entries, got ", loss.size());
  for (Index i = 0; i < k; ++i)
    require(r(i, i) > 0.0F, "[", op, "] R must have a positive diagonal, got ", r(i, i), " at ", i);
}

}  // namespace bitwright
