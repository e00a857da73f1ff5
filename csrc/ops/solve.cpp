// Inverse-free GPTQ with given scales (docs/solver.md 3.3): blocks of 48 columns, whatever the
// groups.
#include <vector>

#include "core/parallel.h"
#include "ops.h"
#include "ops/sweep.h"

namespace bitwright {

namespace {

constexpr Index kBlock = 48;  // a multiple of every mr

struct Panel {
  SweepPanel sweep;
  Buffer<float> scale, zero;  // [group][nr]

  Panel(In<float> w, In<float> r, InVec<std::int32_t> order, In<float> scales, In<float> zeros,
        Index row, const Table& kernels)
      : sweep(w, r, order, row, kBlock, kernels),
        scale(scales.cols() * sweep.nr()),
        zero(scales.cols() * sweep.nr(), true) {
    const Index nr = sweep.nr();
    for (Index g = 0; g < scales.cols(); ++g)
      for (Index lane = 0; lane < nr; ++lane) {
        const bool real = lane < sweep.rows();
        scale[g * nr + lane] = real ? scales(row + lane, g) : 1.0F;
        zero[g * nr + lane] = real ? zeros(row + lane, g) : 0.0F;
      }
  }
};

}  // namespace

void gptq(In<float> w, In<float> r, InVec<std::int32_t> order, In<float> scales, In<float> zeros,
          Index group, const Grid& grid, Out<std::uint8_t> codes, OutVec<double> loss) {
  const Index n = w.rows(), k = w.cols();
  require_codes("gptq", n, k, group, scales, zeros);
  require_scales("gptq", scales);
  require_sweep("gptq", w, r, order, grid, codes, loss);
  const GridLevels levels(grid);
  const Table& kernels = table_of(n, thread_count());
  const auto make = [&](Index row) { return Panel(w, r, order, scales, zeros, row, kernels); };
  const std::vector<SweepBlock> blocks = sweep_blocks(
      k, even_starts(k, kBlock), [&](Index p, Index i) { return r(p, i); }, false, nullptr,
      kernels);
  sweep(n, kernels.nr_f32, blocks, loss, make, [&](Panel& panel, const SweepBlock& block) {
    const float *scale[kBlock], *zero[kBlock];
    for (Index p = 0; p < block.columns; ++p) {
      const Index at = order[block.first + p] / group * panel.sweep.nr();
      scale[p] = panel.scale + at;
      zero[p] = panel.zero + at;
    }
    panel.sweep.run(block, scale, zero, coding_of(grid, levels), false,
                    panel.sweep.error(block.first), [] { return true; });
    panel.sweep.commit(block, codes);
  });
}

}  // namespace bitwright
