// Scales as they are stored: positive values of a ScaleGrid, ties to even; and offsets, of either
// sign, or multiples from 0 on of their step.
#pragma once

#include "kernels/simd.h"
#include "kernels/types.h"

namespace bitwright::BITWRIGHT_ISA_NAME {

inline VF multiple_of(VF x, const float* step, int least, int most) {
  const VF unit = load<VF>(step), bottom = broadcast<VF>(static_cast<float>(least));
  return minimum(maximum(rint(x / unit), bottom), broadcast<VF>(static_cast<float>(most))) * unit;
}

inline VF to_scale_grid(VF s, const ScaleGrid& grid, const float* step) {
  if (grid.most > 0) return multiple_of(s, step, 1, grid.most);
  if (grid.finest > 0.0F) {
    const VF fine = rint(s / grid.finest) * grid.finest;
    ScaleGrid above = grid;
    above.finest = 0.0F;
    return s < 0x1p-14F ? maximum(fine, broadcast<VF>(grid.smallest))
                        : to_scale_grid(s, above, nullptr);
  }
  s = s * grid.global;
  if (grid.mantissa_drop > 0) {
    const std::int32_t low = (1 << grid.mantissa_drop) - 1;
    VI bits = (VI)s;
    bits = (bits + (low >> 1) + ((bits >> grid.mantissa_drop) & 1)) & ~low;
    s = (VF)bits;
  }
  s = minimum(maximum(s, broadcast<VF>(grid.smallest)), broadcast<VF>(grid.largest));
  return grid.global == 1.0F ? s : s / grid.global;
}

inline VF to_offset_grid(VF o, const ScaleGrid& grid, const float* step) {
  if (grid.most > 0) return multiple_of(o, step, 0, grid.most);
  const VF size = o < 0.0F ? -o : o;
  const VF kept = size < grid.smallest * 0.5F ? VF{} : to_scale_grid(size, grid, nullptr);
  return o < 0.0F ? -kept : kept;
}

}  // namespace bitwright::BITWRIGHT_ISA_NAME
