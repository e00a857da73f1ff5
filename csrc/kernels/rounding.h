// The nearest value of a grid: integers around a zero point by arithmetic, tables by comparison.
#pragma once

#include "kernels/simd.h"
#include "kernels/types.h"

namespace bitwright::BITWRIGHT_ISA_NAME {

struct Rounded {
  VF code, level;  // value = level * scale; level = code - zero, or the table's
};

template <bool kTable>
inline Rounded to_grid(VF x, VF zero, const Coding& coding) {
  if (!kTable) {
    const VF code = minimum(maximum(rint(x) + zero, VF{}), broadcast<VF>(coding.max_code));
    return {code, code - zero};
  }
  const Levels* levels = coding.levels;
  Rounded r = {VF{}, broadcast<VF>(levels->values[0])};
  for (int i = 1; i < levels->count; ++i) {
    const auto above = x > levels->middles[i - 1];
    r.code = above ? broadcast<VF>(static_cast<float>(i)) : r.code;
    r.level = above ? broadcast<VF>(levels->values[i]) : r.level;
  }
  return r;
}

}  // namespace bitwright::BITWRIGHT_ISA_NAME
