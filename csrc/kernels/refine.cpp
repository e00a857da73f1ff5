// Steps of the refinement after the sweep (docs/solver.md 7), one row per lane. A step is taken
// where it lowers e H e^T by the gain computed from g; g follows each step within the block.
#include "kernels/rounding.h"
#include "kernels/scale_grid.h"
#include "kernels/simd.h"
#include "kernels/table.h"

namespace bitwright::BITWRIGHT_ISA_NAME {

namespace {

inline bool any(VI mask) {
  std::int32_t lanes = 0;
  for (int lane = 0; lane < kF32; ++lane) lanes |= mask[lane];
  return lanes != 0;
}

}  // namespace

namespace {

template <bool kTable>
inline void descend_block(const DescentBlock& block, bool* moved) {
  const VF bottom = {};
  for (std::int64_t p = 0; p < block.columns; ++p) {
    const float* h = block.h + p * block.ldh;
    const VF pivot = broadcast<VF>(h[p]);
    VF step[kVectors];
    VI here = {};
    for (int v = 0; v < kVectors; ++v) {
      const std::int64_t at = p * kNrF32 + v * kF32;
      const VF s = load<VF>(block.scale[p] + v * kF32), z = load<VF>(block.zero[p] + v * kF32);
      const VF level = load<VF>(block.level + at), g = load<VF>(block.g + at);
      const VF old = level * s;
      const VF wish = (old + g / pivot) / s;
      const VF next = to_grid<kTable>(wish, z, block.coding).level;
      const VF d = old - next * s;
      const VF gain = -d * (2.0F * g + d * pivot);
      const VI better = (gain > 0.0F) & (load<VF>(block.active + v * kF32) > 0.0F);
      step[v] = better ? d : bottom;
      store(block.level + at, better ? next : level);
      store(block.d + at, step[v]);
      float* total = block.gain + v * kF32;
      store(total, load<VF>(total) + (better ? gain : bottom));
      here |= better;
    }
    moved[p] = any(here);
    if (!moved[p]) continue;
    for (std::int64_t j = 0; j < block.columns; ++j) {
      const VF factor = broadcast<VF>(h[j]);
      float* g = block.g + j * kNrF32;
      for (int v = 0; v < kVectors; ++v)
        store(g + v * kF32, fma(step[v], factor, load<VF>(g + v * kF32)));
    }
  }
}

}  // namespace

void descend(const DescentBlock& block, bool* moved) {
  if (block.coding.levels != nullptr)
    descend_block<true>(block, moved);
  else
    descend_block<false>(block, moved);
}

namespace {

inline VF with_sign_of(VF s, VF wish, const ScaleGrid& grid, const float* step) {
  const VF stored = to_scale_grid(s < 0.0F ? -wish : wish, grid, step);
  return s < 0.0F ? -stored : stored;
}

}  // namespace

void rescale(const RescaleGroup& group, bool* moved) {
  const VF bottom = {};
  VI here = {};
  for (int v = 0; v < kVectors; ++v) {
    VF slope = {}, curve = {};
    for (std::int64_t j = 0; j < group.columns; ++j) {
      const std::int64_t at = j * kNrF32 + v * kF32;
      const VF level = load<VF>(group.level + at);
      slope = fma(load<VF>(group.g + at), level, slope);
      curve = fma(load<VF>(group.hl + at), level, curve);
    }
    const VF s = load<VF>(group.scale + v * kF32);
    const VF wish = s + slope / (curve > 0.0F ? curve : broadcast<VF>(1.0F));
    const float* step = group.step == nullptr ? nullptr : group.step + v * kF32;
    const VF next = group.offset ? to_offset_grid(wish, group.grid, step)
                                 : with_sign_of(s, wish, group.grid, step);
    const VF change = next - s;
    const VF gain = change * (2.0F * slope - change * curve);
    const VI better = (gain > 0.0F) & (curve > 0.0F) & (load<VF>(group.active + v * kF32) > 0.0F);
    store(group.scale + v * kF32, better ? next : s);
    float* total = group.gain + v * kF32;
    store(total, load<VF>(total) + (better ? gain : bottom));
    for (std::int64_t j = 0; j < group.columns; ++j) {
      const std::int64_t at = j * kNrF32 + v * kF32;
      const VF level = load<VF>(group.level + at);
      store(group.d + at, better ? level * s - level * next : bottom);
    }
    here |= better;
  }
  if (any(here)) *moved = true;
}

}  // namespace bitwright::BITWRIGHT_ISA_NAME
