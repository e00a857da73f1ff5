// Arguments of the kernels: plain data, no code, so that every instruction set sees the same
// layout.
#pragma once

#include <cstdint>

namespace bitwright {

// Candidates are s = scale_grid(s0 * factors[i]); each is scored by sum_j weight_j |w_j -
// q_j|^power with q rounded on the stored scale; the first of the best wins. No factors: s0 itself.
// mantissa_drop: low bits of a float32 that the scale grid lacks (16: bf16, 13: fp16, 0: fp32).
struct FitOptions {
  int max_code;       // 2^bits - 1
  bool symmetric;     // zero point 2^(bits-1)
  bool search_range;  // symmetric: s0 = max(max/(h-1), -min/h) with h = 2^(bits-1), else
                      // absmax/(h-1)
  bool power_2_4;     // |.|^2.4 (as the reference GPTQ's search) instead of squares
  float zero_min;     // smallest zero point
  int zero_span;      // asymmetric: zero points z0 - span .. z0 + span are tried
  int mantissa_drop;
  float scale_min, scale_max;
  std::int64_t factor_count;
  const float* factors;
};

// One block of `columns` columns of a row panel, columns in solving order:
//   t = w + a / r_kk;  c = clamp(rint(t / s) + z, 0, max_code);  e = w - (c - z) s
//   loss += (r_kk (t - q))^2;  a_j += e r_kj for the later columns j of the block.
// w, a, e: [columns][nr]; r: the diagonal block of R (ldr); scale, zero: per column a row of nr.
struct FeedbackBlock {
  std::int64_t columns;
  const float* r;
  std::int64_t ldr;
  const float* w;
  float* a;
  float* e;
  const float* const* scale;
  const float* const* zero;
  float max_code;
  std::int32_t* codes;  // [columns][nr]
  double* loss;         // [nr]
};

struct ColumnSums {
  double* absolute;  // sum of |x|
  float* abs_max;
  float* minimum;
  float* maximum;
};

}  // namespace bitwright
