// FitSettings, the caller's words, as the FitOptions that the kernel reads.
#pragma once

#include "core/check.h"
#include "kernels/types.h"
#include "ops.h"

namespace bitwright {

inline void require_factors(const char* op, InVec<float> factors) {
  for (Index i = 0; i < factors.size(); ++i)
    require(factors[i] > 0.0F && factors[i] <= 1e4F, "[", op,
            "] factors must be positive and at most 1e4, got ", factors[i], " at ", i);
}

// Largest and smallest scale: the values of the scale grid that are normal numbers in every format
// that the grid promises ("bf16": exact in fp16 too, hence fp16's normal range).
inline ScaleGrid scale_grid(const std::string& name) {
  if (name == "bf16") return {16, 0x1p-14F, 65280.0F};
  if (name == "fp16") return {13, 0x1p-14F, 65504.0F};
  require(name == "fp32", "[fit] scale_grid must be bf16, fp16 or fp32, got ", name);
  return {0, 0x1p-126F, 0x1p126F};
}

inline FitOptions fit_options(const FitSettings& s, InVec<float> factors) {
  require(s.bits >= 1 && s.bits <= 8, "[fit] bits must be 1 to 8, got ", s.bits);
  require(s.zero_min >= 0 && s.zero_min < (1 << s.bits), "[fit] zero_min must be below ",
          1 << s.bits, ", got ", s.zero_min);
  require(s.power == 2.0 || s.power == 2.4, "[fit] power must be 2 or 2.4, got ", s.power);
  require(s.zero_span >= 0 && s.zero_span <= 8, "[fit] zero_span must be 0 to 8, got ",
          s.zero_span);
  FitOptions o{};
  o.max_code = (1 << s.bits) - 1;
  o.symmetric = s.symmetric;
  o.search_range = s.search;
  o.power_2_4 = s.power == 2.4;
  o.zero_min = static_cast<float>(s.zero_min);
  o.zero_span = s.search ? s.zero_span : 0;
  o.negative = s.search && s.negative;
  o.grid = scale_grid(s.scale_grid);
  o.factor_count = s.search ? factors.size() : 0;
  o.factors = factors.data();
  return o;
}

}  // namespace bitwright
