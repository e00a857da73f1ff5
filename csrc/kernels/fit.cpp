// Scale search of one group, one row per lane (docs/solver.md 6.1, 6.2; GPTQ 2210.17323 for
// power 2.4). No fused multiply-add: the scores are the same floats at every level, and in the
// NumPy reference.
#include "kernels/rounding.h"
#include "kernels/scale_grid.h"
#include "kernels/simd.h"
#include "kernels/table.h"

namespace bitwright::BITWRIGHT_ISA_NAME {

namespace {

// y^(1/5) for y >= 0: a first guess from the exponent bits, then four Newton steps.
inline VF fifth_root(VF y) {
  VF root =
      (VF)(__builtin_convertvector(__builtin_convertvector((VI)y, VF) * 0.2F, VI) + 852283000);
  for (int step = 0; step < 4; ++step) {
    const VF square = root * root;
    root = root * 0.8F + y * 0.2F / (square * square);
  }
  return root;
}

template <bool kPower24, bool kTable>
inline VF score(const FitOptions& o, std::int64_t columns, const float* w, const float* weight,
                VF s, VF z) {
  const VF offset = o.coding.offset ? z : VF{}, zero = o.coding.offset ? VF{} : z;
  VF sum = {};
  for (std::int64_t j = 0; j < columns; ++j) {
    const VF value = load<VF>(w + j * kNrF32);
    const VF level = to_grid<kTable>((value + offset) / s, zero, o.coding).level;
    const VF error = value - (level * s - offset);
    VF loss = error * error;
    if (kPower24) loss = loss > 1e-30F ? loss * fifth_root(loss) : VF{};
    sum = sum + (weight != nullptr ? loss * weight[j] : loss);
  }
  return sum;
}

struct Range {
  VF low, high;
};

inline Range range_of(std::int64_t columns, const float* w) {
  Range r = {VF{}, VF{}};
  for (std::int64_t j = 0; j < columns; ++j) {
    const VF value = load<VF>(w + j * kNrF32);
    r.low = minimum(r.low, value);
    r.high = maximum(r.high, value);
  }
  return r;
}

// The scale that spans the range; turned: of a grid whose scale is negative.
inline VF symmetric_start(const FitOptions& o, const Range& r, bool turned) {
  const VF up = turned ? -r.low : r.high, down = turned ? r.high : -r.low;
  VF s = o.search_range ? maximum(up / o.above, down / o.below) : maximum(up, down) / o.above;
  s = s > 0.0F ? s : broadcast<VF>(1.0F);
  if (o.grid.mantissa_drop == 23) s = (VF)((VI)s & ~((1 << 23) - 1));  // e8m0: not above the range
  return s;
}

struct Pair {
  VF scale, zero;
};

// Candidates per factor, and the one with number i: shifts of the zero point 0, -1, 1, -2, 2, ...;
// on symmetric grids the scale, and where asked for the scale with its sign turned.
inline std::int64_t per_factor(const FitOptions& o) {
  return o.symmetric ? (o.negative ? 2 : 1) : 2 * o.zero_span + 1;
}

inline Pair pair_of(const FitOptions& o, const Range& r, std::int64_t i, int vector) {
  const float* step = o.step == nullptr ? nullptr : o.step + vector * kF32;
  const float factor = o.factor_count > 0 ? o.factors[i / per_factor(o)] : 1.0F;
  const std::int64_t d = i % per_factor(o);
  if (o.symmetric) {
    const VF s = to_scale_grid(symmetric_start(o, r, d == 1) * factor, o.grid, step);
    return {d == 1 ? -s : s, broadcast<VF>(o.middle)};
  }
  const VF top = broadcast<VF>(o.coding.max_code);
  const auto empty = r.low == r.high;
  const VF bottom = o.coding.offset ? VF{} : broadcast<VF>(-1.0F);
  const VF low = empty ? bottom : r.low, high = empty ? broadcast<VF>(1.0F) : r.high;
  const VF s = to_scale_grid((high - low) / top * factor, o.grid, step);
  const float shift = static_cast<float>(d % 2 == 1 ? -(d + 1) / 2 : d / 2);
  if (o.coding.offset) {
    const float* offset_step = o.offset_step == nullptr ? nullptr : o.offset_step + vector * kF32;
    return {s, to_offset_grid(s * (shift * 0.25F) - low * factor, o.grid, offset_step)};
  }
  const VF z = rint(-low * factor / s) + shift;
  return {s, minimum(maximum(z, broadcast<VF>(o.zero_min)), top)};
}

struct Best {
  VF score, scale, zero;
};

inline void consider(Best& best, VF score, VF s, VF z) {
  const auto better = score < best.score;
  best.score = better ? score : best.score;
  best.scale = better ? s : best.scale;
  best.zero = better ? z : best.zero;
}

template <bool kPower24, bool kTable>
inline void fit_vector(const FitOptions& o, std::int64_t columns, const float* w,
                       const float* weight, int vector, float* scale, float* zero) {
  const Range r = range_of(columns, w);
  const std::int64_t count = o.factor_count > 0 ? o.factor_count * per_factor(o) : 1;
  Best best = {};
  for (std::int64_t i = 0; i < count; ++i) {
    const Pair at = pair_of(o, r, i, vector);
    // the first is kept where every score overflows
    if (i == 0) best = {broadcast<VF>(__builtin_inff()), at.scale, at.zero};
    const VF loss = o.factor_count > 0
                        ? score<kPower24, kTable>(o, columns, w, weight, at.scale, at.zero)
                        : VF{};
    consider(best, loss, at.scale, at.zero);
  }
  store(scale, best.scale);
  store(zero, best.zero);
}

}  // namespace

void fit_group(const FitOptions& options, std::int64_t columns, const float* w, const float* weight,
               float* scale, float* zero) {
  for (int v = 0; v < kVectors; ++v) {
    const auto fit = options.coding.levels != nullptr
                         ? (options.power_2_4 ? fit_vector<true, true> : fit_vector<false, true>)
                         : (options.power_2_4 ? fit_vector<true, false> : fit_vector<false, false>);
    fit(options, columns, w + v * kF32, weight, v, scale + v * kF32, zero + v * kF32);
  }
}

namespace {

// The first `count` lanes; the others are 0, which no range minds.
inline VF load_some(const float* from, std::int64_t count) {
  VF value = {};
  for (std::int64_t lane = 0; lane < count; ++lane) value[lane] = from[lane];
  return value;
}

using Codes = std::uint8_t __attribute__((vector_size(kF32)));
inline Codes codes_of(const FitOptions& options, VF value, const Pair& at) {
  const VF code = to_grid<false>(value / at.scale, at.zero, options.coding).code;
  return __builtin_convertvector(__builtin_convertvector(code, VI), Codes);
}

// pick over all lanes, half against half.
template <int kLanes, class Pick>
inline float across(const float* lanes, const Pick& pick) {
  if constexpr (kLanes == 1) {
    return *lanes;
  } else {
    float left[kLanes / 2];
    for (int i = 0; i < kLanes / 2; ++i) left[i] = pick(lanes[i], lanes[i + kLanes / 2]);
    return across<kLanes / 2>(left, pick);
  }
}

inline Range range_along(std::int64_t columns, const float* w) {
  Range r = {VF{}, VF{}};
  const auto widen = [&](VF value) {
    r.low = minimum(r.low, value);
    r.high = maximum(r.high, value);
  };
  std::int64_t j = 0;
  for (; j + kF32 <= columns; j += kF32) widen(load<VF>(w + j));
  if (j < columns) widen(load_some(w + j, columns - j));
  float low[kF32], high[kF32];
  store(low, r.low);
  store(high, r.high);
  return {broadcast<VF>(across<kF32>(low, [](float a, float b) { return a < b ? a : b; })),
          broadcast<VF>(across<kF32>(high, [](float a, float b) { return a > b ? a : b; }))};
}

}  // namespace

void round_row(const FitOptions& options, std::int64_t k, std::int64_t group, const float* w,
               float* scale, float* zero, std::uint8_t* codes) {
  for (std::int64_t first = 0; first < k; first += group, ++scale, ++zero) {
    const std::int64_t end = k - first < group ? k : first + group;
    const Pair at = pair_of(options, range_along(end - first, w + first), 0, 0);
    *scale = at.scale[0];
    *zero = at.zero[0];
    std::int64_t j = first;
    for (; j + kF32 <= end; j += kF32) store(codes + j, codes_of(options, load<VF>(w + j), at));
    if (j == end) continue;
    const Codes rest = codes_of(options, load_some(w + j, end - j), at);
    for (std::int64_t lane = 0; j < end; ++j, ++lane) codes[j] = rest[lane];
  }
}

void span(std::int64_t columns, const float* w, float* low, float* high) {
  for (int v = 0; v < kVectors; ++v) {
    const Range r = range_of(columns, w + v * kF32);
    store(low + v * kF32, r.low);
    store(high + v * kF32, r.high);
  }
}

void candidate(const FitOptions& options, const float* low, const float* high, std::int64_t i,
               float* scale, float* zero) {
  for (int v = 0; v < kVectors; ++v) {
    const Range r = {load<VF>(low + v * kF32), load<VF>(high + v * kF32)};
    const Pair at = pair_of(options, r, i, v);
    store(scale + v * kF32, at.scale);
    store(zero + v * kF32, at.zero);
  }
}

}  // namespace bitwright::BITWRIGHT_ISA_NAME
