// Arguments of the kernels: plain data, no code, so that every instruction set sees the same
// layout.
#pragma once

#include <cstdint>

namespace bitwright {

// Where scales live: stored / global, stored a float32 without its `mantissa_drop` low bits (16:
// bf16, 13: fp16, 0: fp32, 20: e4m3, 23: e8m0), smallest to largest; or, most > 0, whole multiples
// 1 .. most of a step that each lane has.
struct ScaleGrid {
  int mantissa_drop;
  float smallest, largest;
  float global;  // 1 but for e4m3, whose matrix has one more scale
  float finest;  // spacing of the numbers below 2^-14, 0: as of those above
  int most;
};

// The levels of a table grid, ascending; a value above middles[i] takes level i + 1 or a higher
// one.
struct Levels {
  int count;
  const float* values;
  const float* middles;
};

// How codes become values: (code - zero) scale, of levels level * scale; offset: `zero` is no code
// but in the units of the weights, code * scale - zero.
struct Coding {
  const Levels* levels;  // null: integers up to max_code
  float max_code;
  bool offset;
};

// Candidates are s = scale_grid(s0 * factors[i]); each is scored by sum_j weight_j |w_j -
// q_j|^power with q rounded on the stored scale; the first of the best wins. No factors: s0 itself.
struct FitOptions {
  Coding coding;
  float above, below;  // symmetric: the ends of the range, h - 1 and h with h = 2^(bits-1)
  float middle;        // symmetric: the zero point, h (tables: 0)
  bool symmetric;
  bool negative;      // symmetric: each candidate is also tried with its sign turned
  bool search_range;  // symmetric: s0 = max(max/above, -min/below), else absmax/above
  bool power_2_4;     // |.|^2.4 (as the reference GPTQ's search) instead of squares
  float zero_min;     // smallest zero point
  int zero_span;  // asymmetric: zero points z0 - span .. z0 + span are tried; of offsets quarters
                  // of the scale
  ScaleGrid grid, step_grid;
  const float *step, *offset_step;  // [nr] where grid.most > 0
  std::int64_t factor_count;
  const float* factors;
};

// One block of `columns` columns of a row panel, columns in solving order:
//   t = w + a / r_kk;  c = clamp(rint(t / s) + z, 0, max_code) or the nearest level;  e = w - q;
//   of offsets c = clamp(rint((t + z) / s), 0, max_code), q = c s - z
//   loss += (r_kk (t - q))^2;  a_j += e r_kj for the later columns j of the block.
// w, a, e: [columns][nr]; r: the diagonal block of R (ldr); scale, zero: per column a row of nr.
// open: nothing is rounded, e = w - t, so that w - e are the targets of the whole block at once.
struct FeedbackBlock {
  std::int64_t columns;
  const float* r;
  std::int64_t ldr;
  const float* w;
  float* a;
  float* e;
  const float* const* scale;
  const float* const* zero;
  Coding coding;
  bool open;
  std::int32_t* codes;  // [columns][nr]
  float* loss;          // [nr]
};

// One block of a coordinate-descent sweep (docs/solver.md 7.1), levels l = c - z (of offsets l = c
// and z = 0, the offset being part of w), g = (w - q) H:
//   q' = (clamp(rint((q + g / h_kk) / s) + z, 0, max_code) - z) s,  d = q - q'
//   where -d (2 g + d h_kk) > 0 and the lane is active: l = l', gain += that, g_j += d h_kj in the
//   block; else d = 0.
// h: the diagonal block of H (ldh); level, g, d: [columns][nr]; active, gain: [nr].
struct DescentBlock {
  std::int64_t columns;
  const float* h;
  std::int64_t ldh;
  const float* const* scale;
  const float* const* zero;
  Coding coding;
  const float* active;
  float* level;
  float* g;
  float* d;
  float* gain;
};

// The least-squares step of one group's scale (docs/solver.md 7.2), hl = H_gg l:
//   s' = scale_grid(s + sum g l / sum l hl), sign kept;  d = l s - l s'
//   where the gain (s' - s) (2 sum g l - (s' - s) sum l hl) is positive and the lane is active.
// offset: s is the group's offset and l = -1, its sign is free.
struct RescaleGroup {
  std::int64_t columns;
  ScaleGrid grid;
  const float* step;  // [nr] where grid.most > 0
  bool offset;
  const float* level;
  const float* g;
  const float* hl;
  const float* active;
  float* scale;
  float* d;
  float* gain;
};

struct ColumnSums {
  double* absolute;  // sum of |x|
  float* abs_max;
  float* minimum;
  float* maximum;
};

// Queries over the keys and values of one head, (keys, width) each, float32 or bf16:
//   out = sum_j p_j value_j,  p_j = e^(scale query key_j - largest) / sum of them
// over the first visible[i] keys but those with mask[i][j] = 0; 0 where none is left. scores: room
// for 4 rows of `stride`, a multiple of 16 not below any of visible.
struct Attention {
  std::int64_t rows, width, stride;
  const float* const* query;
  float* const* out;
  const std::int64_t* visible;
  const std::uint8_t* const* mask;  // or null
  const void *keys, *values;
  bool bf16;
  float scale;
  float* scores;
};

}  // namespace bitwright
