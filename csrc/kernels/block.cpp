// The small loops of a decoder block: root mean squares, attention of a few queries over the keys
// of one head, SiLU. A sum over a head, a row or the keys is 16 sums, of every sixteenth term in
// ascending order, added i and i + 8, then i + 4, i + 2, i + 1: the same bits at every vector
// width.
#include "kernels/panels.h"
#include "kernels/table.h"

namespace bitwright::BITWRIGHT_ISA_NAME {

namespace {

inline constexpr int kSums = 16, kVecs = kSums / kF32;  // vectors of 16 sums
inline constexpr float kInfinity = __builtin_inff();

template <class T>
inline VF load_wide(const T* from) {
  if constexpr (sizeof(T) == 4)
    return load<VF>(from);
  else
    return widen(reinterpret_cast<const std::uint8_t*>(from), true);
}

// The first `count` of a vector's numbers, the others 0.
template <class T>
inline VF load_some(const T* from, std::int64_t count) {
  alignas(kBytes) T padded[kF32] = {};
  for (std::int64_t i = 0; i < (count < kF32 ? count : kF32); ++i) padded[i] = from[i];
  return load_wide(padded);
}

inline VF choose(VI which, VF yes, VF no) { return which ? yes : no; }

// e^x to 2 units in the last place; 0 below e^-87, infinite above e^88.
inline VF exponential(VF x) {
  const VF n =
      rint(minimum(maximum(x, broadcast<VF>(-87.0F)), broadcast<VF>(88.0F)) * 0x1.715476p0F);
  const VF r = fma(n, broadcast<VF>(0x1.bd0106p-13F), fma(n, broadcast<VF>(-0x1.63p-1F), x));
  VF sum = broadcast<VF>(1.0F / 5040.0F);
  constexpr float kTerms[] = {1.0F / 720.0F, 1.0F / 120.0F, 1.0F / 24.0F, 1.0F / 6.0F,
                              0.5F,          1.0F,          1.0F};
  for (const float term : kTerms) sum = fma(sum, r, broadcast<VF>(term));
  const VF power = (VF)((__builtin_convertvector(n, VI) + 127) << 23);
  const VF value = choose(x < -87.0F, VF{}, sum * power);
  return choose(x > 88.0F, broadcast<VF>(kInfinity), value);
}

#if defined(__clang__) || __GNUC__ >= 12
#define BITWRIGHT_PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define BITWRIGHT_PICK(a, b, ...) __builtin_shuffle(a, b, VI{__VA_ARGS__})
#endif

// a and b are runs of 2 kHalf lanes; their halves are added, those of a first.
template <int kHalf>
inline VF fold(VF a, VF b) {
#if defined(__AVX512F__)
  if constexpr (kHalf == 8)
    return BITWRIGHT_PICK(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           BITWRIGHT_PICK(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  else if constexpr (kHalf == 4)
    return BITWRIGHT_PICK(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           BITWRIGHT_PICK(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  else if constexpr (kHalf == 2)
    return BITWRIGHT_PICK(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
           BITWRIGHT_PICK(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
  else
    return BITWRIGHT_PICK(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           BITWRIGHT_PICK(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif defined(__AVX2__)
  if constexpr (kHalf == 4)
    return BITWRIGHT_PICK(a, b, 0, 1, 2, 3, 8, 9, 10, 11) +
           BITWRIGHT_PICK(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  else if constexpr (kHalf == 2)
    return BITWRIGHT_PICK(a, b, 0, 1, 4, 5, 8, 9, 12, 13) +
           BITWRIGHT_PICK(a, b, 2, 3, 6, 7, 10, 11, 14, 15);
  else
    return BITWRIGHT_PICK(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
           BITWRIGHT_PICK(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  if constexpr (kHalf == 2)
    return BITWRIGHT_PICK(a, b, 0, 1, 4, 5) + BITWRIGHT_PICK(a, b, 2, 3, 6, 7);
  else
    return BITWRIGHT_PICK(a, b, 0, 2, 4, 6) + BITWRIGHT_PICK(a, b, 1, 3, 5, 7);
#endif
}

// 16 sums as one vector: of each its halves, until they fill one.
inline VF narrow(VF (&sum)[kVecs]) {
  for (int half = kVecs / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
  return sum[0];
}

// Lane i: all lanes of v[i] added.
template <int kHalf = kF32 / 2>
inline VF totals(VF (&v)[kF32]) {
  if constexpr (kHalf == 0) {
    return v[0];
  } else {
    for (int i = 0; i < kHalf; ++i) v[i] = fold<kHalf>(v[2 * i], v[2 * i + 1]);
    return totals<kHalf / 2>(v);
  }
}

inline float total(VF (&sum)[kVecs]) {
  alignas(kBytes) float lanes[kF32];
  store(lanes, narrow(sum));
  for (int half = kF32 / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

#if defined(__AVX512F__)
inline constexpr int kMostRows = 4;
#else
inline constexpr int kMostRows = 2;
#endif

// Products of kRows queries with a vector of keys from `first` on, scaled.
template <class T, int kRows>
inline void score(const Attention& a, std::int64_t row, std::int64_t keys, std::int64_t first,
                  const VF (&tail)[kRows][kVecs]) {
  VF sums[kRows][kF32];
  const std::int64_t whole = a.width / kSums * kSums;
  for (int i = 0; i < kF32; ++i) {
    const std::int64_t key = first + i < keys ? first + i : keys - 1;
    const T* k = static_cast<const T*>(a.keys) + key * a.width;
    VF sum[kRows][kVecs] = {};
    for (std::int64_t d = 0; d < whole; d += kSums)
      for (int v = 0; v < kVecs; ++v) {
        const VF x = load_wide(k + d + v * kF32);
        for (int r = 0; r < kRows; ++r)
          sum[r][v] = fma(load<VF>(a.query[row + r] + d + v * kF32), x, sum[r][v]);
      }
    if (whole < a.width)
      for (int v = 0; v < kVecs; ++v) {
        const VF x = load_some(k + whole + v * kF32, a.width - whole - v * kF32);
        for (int r = 0; r < kRows; ++r) sum[r][v] = fma(tail[r][v], x, sum[r][v]);
      }
    for (int r = 0; r < kRows; ++r) sums[r][i] = narrow(sum[r]);
  }
  for (int r = 0; r < kRows; ++r) store(a.scores + r * a.stride + first, totals(sums[r]) * a.scale);
}

// Scores to weights e^(s - largest), those past the visible keys and of masked ones 0; their sum.
inline float soften(const Attention& a, std::int64_t row, std::int64_t keys, float* scores) {
  for (std::int64_t j = a.visible[row]; j < a.stride; ++j) scores[j] = -kInfinity;
  if (a.mask != nullptr)
    for (std::int64_t j = 0; j < a.visible[row]; ++j)
      if (a.mask[row][j] == 0) scores[j] = -kInfinity;
  VF most = broadcast<VF>(-kInfinity);
  for (std::int64_t j = 0; j < keys; j += kF32) most = maximum(most, load<VF>(scores + j));
  alignas(kBytes) float lanes[kF32];
  store(lanes, most);
  float largest = lanes[0];
  for (int i = 1; i < kF32; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  if (largest == -kInfinity) largest = 0.0F;
  VF sum[kVecs] = {};
  for (std::int64_t j = 0; j < keys; j += kSums)
    for (int v = 0; v < kVecs; ++v) {
      const VF weight = exponential(load<VF>(scores + j + v * kF32) - largest);
      store(scores + j + v * kF32, weight);
      sum[v] += weight;
    }
  return total(sum);
}

// Weighted sums of the values' columns from d on, kVectors vectors of them (the last one's first
// `count` columns).
template <class T, int kRows, int kVectors>
inline void mix(const Attention& a, std::int64_t row, std::int64_t keys, std::int64_t d,
                std::int64_t count, const float (&sum)[kRows]) {
  VF out[kRows][kVectors] = {};
  const T* values = static_cast<const T*>(a.values) + d;
  const bool whole = count == kVectors * kF32;
  const auto add = [&](std::int64_t j, bool all) {
    VF x[kVectors];
    for (int v = 0; v < kVectors; ++v)
      x[v] = whole ? load_wide(values + v * kF32) : load_some(values + v * kF32, count - v * kF32);
    for (int r = 0; r < kRows; ++r) {
      if (!all && j >= a.visible[row + r]) continue;  // 0 times what may not be finite
      const VF weight = broadcast<VF>(a.scores[r * a.stride + j]);
      for (int v = 0; v < kVectors; ++v) out[r][v] = fma(weight, x[v], out[r][v]);
    }
    values += a.width;
  };
  std::int64_t common = keys, j = 0;
  for (int r = 0; r < kRows; ++r)
    common = a.visible[row + r] < common ? a.visible[row + r] : common;
  for (; j < common; ++j) add(j, true);
  for (; j < keys; ++j) add(j, false);
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) {
      const VF y = sum[r] > 0.0F || sum[r] != sum[r] ? out[r][v] / sum[r] : VF{};
      alignas(kBytes) float lanes[kF32];
      store(lanes, y);
      for (std::int64_t i = 0; i < kF32 && v * kF32 + i < count; ++i)
        a.out[row + r][d + v * kF32 + i] = lanes[i];
    }
}

template <class T, int kRows>
inline void attend_rows(const Attention& a, std::int64_t row) {
  std::int64_t keys = 0;
  VF tail[kRows][kVecs] = {};
  const std::int64_t whole = a.width / kSums * kSums;
  for (int r = 0; r < kRows; ++r) {
    keys = a.visible[row + r] > keys ? a.visible[row + r] : keys;
    for (int v = 0; v < kVecs; ++v)
      tail[r][v] = load_some(a.query[row + r] + whole + v * kF32, a.width - whole - v * kF32);
  }
  for (std::int64_t j = 0; j < keys; j += kF32) score<T, kRows>(a, row, keys, j, tail);
  float sum[kRows];
  for (int r = 0; r < kRows; ++r) sum[r] = soften(a, row + r, keys, a.scores + r * a.stride);
  std::int64_t d = 0;
  for (; d + 4 * kF32 <= a.width; d += 4 * kF32) mix<T, kRows, 4>(a, row, keys, d, 4 * kF32, sum);
  for (; d < a.width; d += kF32)
    mix<T, kRows, 1>(a, row, keys, d, a.width - d < kF32 ? a.width - d : kF32, sum);
}

template <class T>
inline void attend_all(const Attention& a) {
  std::int64_t row = 0;
  for (; row + kMostRows <= a.rows; row += kMostRows) attend_rows<T, kMostRows>(a, row);
  if constexpr (kMostRows == 4) {
    if (a.rows - row == 3) return attend_rows<T, 3>(a, row);
    if (a.rows - row == 2) return attend_rows<T, 2>(a, row);
  }
  if (a.rows - row == 1) attend_rows<T, 1>(a, row);
}

// Rows first .. first + kF32 - 1 of w, of the last ones the last, times one token.
inline VF dot_vector(std::int64_t rows, std::int64_t k, std::int64_t first, const float* x,
                     const std::uint16_t* w) {
  const std::uint16_t* row[kF32];
  for (int i = 0; i < kF32; ++i) row[i] = w + (first + i < rows ? first + i : rows - 1) * k;
  VF sum[kF32][kVecs] = {};
  const std::int64_t whole = k / kSums * kSums;
  for (std::int64_t d = 0; d < whole; d += kSums)
    for (int v = 0; v < kVecs; ++v) {
      const VF right = load<VF>(x + d + v * kF32);
      for (int i = 0; i < kF32; ++i)
        sum[i][v] = fma(load_wide(row[i] + d + v * kF32), right, sum[i][v]);
    }
  if (whole < k)
    for (int v = 0; v < kVecs; ++v) {
      const std::int64_t d = whole + v * kF32;
      const VF right = load_some(x + d, k - d);
      for (int i = 0; i < kF32; ++i)
        sum[i][v] = fma(load_some(row[i] + d, k - d), right, sum[i][v]);
    }
  VF sums[kF32];
  for (int i = 0; i < kF32; ++i) sums[i] = narrow(sum[i]);
  return totals(sums);
}

}  // namespace

void dot_rows(std::int64_t rows, std::int64_t k, const float* x, const std::uint16_t* w, float* y) {
  for (std::int64_t i = 0; i < rows; i += kF32) {
    const VF out = dot_vector(rows, k, i, x, w);
    if (i + kF32 <= rows) {
      store(y + i, out);
    } else {
      alignas(kBytes) float lanes[kF32];
      store(lanes, out);
      for (std::int64_t j = 0; i + j < rows; ++j) y[i + j] = lanes[j];
    }
  }
}

void rms_norm(std::int64_t count, const float* x, const float* gain, float epsilon, float* y) {
  VF sum[kVecs] = {};
  const std::int64_t whole = count / kSums * kSums;
  for (std::int64_t i = 0; i < whole; i += kSums)
    for (int v = 0; v < kVecs; ++v) {
      const VF value = load<VF>(x + i + v * kF32);
      sum[v] = fma(value, value, sum[v]);
    }
  for (int v = 0; v < kVecs; ++v) {
    const VF value = load_some(x + whole + v * kF32, count - whole - v * kF32);
    sum[v] = fma(value, value, sum[v]);
  }
  const float factor = 1.0F / __builtin_sqrtf(total(sum) / static_cast<float>(count) + epsilon);
  for (std::int64_t i = 0; i < count; ++i) y[i] = gain[i] * (x[i] * factor);
}

void attend(const Attention& a) {
  if (a.bf16) return attend_all<std::uint16_t>(a);
  attend_all<float>(a);
}

void silu_gate(std::int64_t count, float* gate, const float* up) {
  for (std::int64_t i = 0; i < count; i += kF32) {
    const bool whole = i + kF32 <= count;
    const VF x = whole ? load<VF>(gate + i) : load_some(gate + i, count - i);
    const VF other = whole ? load<VF>(up + i) : load_some(up + i, count - i);
    const VF y = x / (exponential(-x) + 1.0F) * other;
    if (whole) {
      store(gate + i, y);
    } else {
      alignas(kBytes) float lanes[kF32];
      store(lanes, y);
      for (std::int64_t j = 0; i + j < count; ++j) gate[i + j] = lanes[j];
    }
  }
}

}  // namespace bitwright::BITWRIGHT_ISA_NAME
