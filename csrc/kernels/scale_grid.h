// Scales as they are stored: positive values of a ScaleGrid, ties to even.
#pragma once

#include "kernels/simd.h"
#include "kernels/types.h"

namespace bitwright::BITWRIGHT_ISA_NAME {

inline VF to_scale_grid(VF s, const ScaleGrid& grid) {
  s = s * grid.global;
  if (grid.mantissa_drop > 0) {
    const std::int32_t low = (1 << grid.mantissa_drop) - 1;
    VI bits = (VI)s;
    bits = (bits + (low >> 1) + ((bits >> grid.mantissa_drop) & 1)) & ~low;
    s = (VF)bits;
  }
  return minimum(maximum(s, broadcast<VF>(grid.smallest)), broadcast<VF>(grid.largest)) /
         grid.global;
}

}  // namespace bitwright::BITWRIGHT_ISA_NAME
