// Scale search of one group, one row per lane (solver.md 6.1, 6.2; GPTQ 2210.17323 for power 2.4).
// No fused multiply-add: the scores are the same floats at every level, and in the NumPy reference.
#include "kernels/simd.h"
#include "kernels/table.h"

namespace bitwright::BITWRIGHT_ISA_NAME {

namespace {

inline VF to_scale_grid(VF s, const FitOptions& o) {
  if (o.mantissa_drop > 0) {
    const std::int32_t low = (1 << o.mantissa_drop) - 1;
    VI bits = (VI)s;
    bits = (bits + (low >> 1) + ((bits >> o.mantissa_drop) & 1)) & ~low;
    s = (VF)bits;
  }
  return minimum(maximum(s, broadcast<VF>(o.scale_min)), broadcast<VF>(o.scale_max));
}

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

template <bool kPower24>
inline VF score(const FitOptions& o, std::int64_t columns, const float* w, const float* weight,
                VF s, VF z) {
  const VF top = broadcast<VF>(static_cast<float>(o.max_code)), bottom = {};
  VF sum = {};
  for (std::int64_t j = 0; j < columns; ++j) {
    const VF value = load<VF>(w + j * kNrF32);
    const VF code = minimum(maximum(rint(value / s) + z, bottom), top);
    const VF error = value - (code - z) * s;
    VF loss = error * error;
    if (kPower24) loss = loss > 1e-30F ? loss * fifth_root(loss) : bottom;
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

inline VF symmetric_start(const FitOptions& o, const Range& r) {
  const float half = static_cast<float>((o.max_code + 1) / 2);
  const float below = half > 1.0F ? half - 1.0F : 1.0F;
  const VF s =
      o.search_range ? maximum(r.high / below, -r.low / half) : maximum(r.high, -r.low) / below;
  return s > 0.0F ? s : broadcast<VF>(1.0F);
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

template <bool kPower24>
inline void fit_vector(const FitOptions& o, std::int64_t columns, const float* w,
                       const float* weight, float* scale, float* zero) {
  const VF top = broadcast<VF>(static_cast<float>(o.max_code));
  const VF infinite = broadcast<VF>(__builtin_inff());
  const Range r = range_of(columns, w);
  const auto empty = r.low == r.high;
  const VF low = empty ? broadcast<VF>(-1.0F) : r.low, high = empty ? broadcast<VF>(1.0F) : r.high;
  const VF start = o.symmetric ? symmetric_start(o, r) : (high - low) / top;
  const VF middle = broadcast<VF>(static_cast<float>((o.max_code + 1) / 2));
  const VF zero_min = broadcast<VF>(o.zero_min);
  const float one = 1.0F;
  const float* factors = o.factor_count > 0 ? o.factors : &one;
  const std::int64_t count = o.factor_count > 0 ? o.factor_count : 1;
  Best best = {};
  for (std::int64_t i = 0; i < count; ++i) {
    const VF s = to_scale_grid(start * factors[i], o);
    const VF z0 = o.symmetric ? middle : rint(-low * factors[i] / s);
    for (int d = 0; d <= (o.symmetric ? 0 : 2 * o.zero_span); ++d) {
      const float shift = static_cast<float>(d % 2 == 1 ? -(d + 1) / 2 : d / 2);
      const VF z = o.symmetric ? middle : minimum(maximum(z0 + shift, zero_min), top);
      if (i == 0 && d == 0) best = {infinite, s, z};  // kept where every score overflows
      const VF loss = o.factor_count > 0 ? score<kPower24>(o, columns, w, weight, s, z) : VF{};
      consider(best, loss, s, z);
    }
  }
  store(scale, best.scale);
  store(zero, best.zero);
}

}  // namespace

void fit_group(const FitOptions& options, std::int64_t columns, const float* w, const float* weight,
               float* scale, float* zero) {
  for (int v = 0; v < kVectors; ++v) {
    const auto fit = options.power_2_4 ? fit_vector<true> : fit_vector<false>;
    fit(options, columns, w + v * kF32, weight, scale + v * kF32, zero + v * kF32);
  }
}

}  // namespace bitwright::BITWRIGHT_ISA_NAME
