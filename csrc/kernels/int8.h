// Sums of four products of unsigned and signed bytes per 32-bit lane, exact at every level.
//
// Without VNNI, pairs of products are added in 16 bits and would saturate above 2^15: codes up to
// 15 are safe, and so are their sums over the four quads of a strip (4 * 2 * 15 * 127 = 15240); of
// others the highest bit goes apart (2 * 127 * 127 = 32258).
#pragma once

#include "kernels/panels.h"

namespace bitwright::BITWRIGHT_ISA_NAME {

#if defined(__AVX512VNNI__)
#define BITWRIGHT_PAIR
inline constexpr bool kVnni = true;
inline VI dot4(VI sum, VI bytes, VI x) {
  return (VI)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)bytes, (__m512i)x);
}
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
inline constexpr bool kVnni = true;
inline VI dot4(VI sum, VI bytes, VI x) {
  return (VI)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)bytes, (__m256i)x);
}
#elif defined(__ARM_FEATURE_MATMUL_INT8)
inline constexpr bool kVnni = true;
inline VI dot4(VI sum, VI bytes, VI x) {
  return (VI)vusdotq_s32((int32x4_t)sum, (uint8x16_t)bytes, (int8x16_t)x);
}
#else
inline constexpr bool kVnni = false;
inline VI dot4(VI sum, VI, VI) { return sum; }
#endif

using V16 = std::int16_t __attribute__((vector_size(kBytes)));

#if defined(__AVX512F__)
inline V16 pairs(VI bytes, VI x) { return (V16)_mm512_maddubs_epi16((__m512i)bytes, (__m512i)x); }
inline VI add_pairs(V16 a, V16 b) { return (VI)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
inline VI look_up_bytes(const std::uint8_t* table, VI codes) {
  const __m512i every =
      _mm512_maskz_broadcast_i32x4(0xFFFF, _mm_loadu_si128((const __m128i*)table));
  return (VI)_mm512_shuffle_epi8(every, (__m512i)codes);
}
#elif defined(__AVX2__)
inline V16 pairs(VI bytes, VI x) { return (V16)_mm256_maddubs_epi16((__m256i)bytes, (__m256i)x); }
inline VI add_pairs(V16 a, V16 b) { return (VI)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
inline VI look_up_bytes(const std::uint8_t* table, VI codes) {
  const __m256i every = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
  return (VI)_mm256_shuffle_epi8(every, (__m256i)codes);
}
#elif defined(__SSSE3__)
inline V16 pairs(VI bytes, VI x) { return (V16)_mm_maddubs_epi16((__m128i)bytes, (__m128i)x); }
inline VI add_pairs(V16 a, V16 b) { return (VI)_mm_madd_epi16((__m128i)a, (__m128i)b); }
inline VI look_up_bytes(const std::uint8_t* table, VI codes) {
  return (VI)_mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)table), (__m128i)codes);
}
#else
inline VI look_up_bytes(const std::uint8_t* table, VI codes) {
  using Bytes = std::uint8_t __attribute__((vector_size(kBytes)));
  Bytes found = (Bytes)codes;
  for (int i = 0; i < kBytes; ++i) found[i] = table[found[i] & 15];
  return (VI)found;
}
#endif

#if defined(__ARM_FEATURE_DOTPROD)
inline VI dot_small(VI sum, VI bytes, VI x) {
  return (VI)vdotq_s32((int32x4_t)sum, (int8x16_t)bytes, (int8x16_t)x);
}
#elif defined(__aarch64__)
inline VI dot_small(VI sum, VI bytes, VI x) {
  const int8x16_t a = (int8x16_t)bytes, b = (int8x16_t)x;
  const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)));
  return sum + (VI)vpaddq_s32(low, vpaddlq_s16(vmull_high_s8(a, b)));
}
#elif !defined(__SSSE3__)
inline VI dot_small(VI sum, VI bytes, VI x) {
  for (int t = 0; t < 32; t += 8) sum += ((bytes >> t) & 255) * ((x << (24 - t)) >> 24);
  return sum;
}
#endif

// sum + the products of a strip's quads with those of one token, `stride` words apart.
template <bool kSmall>  // codes up to 15
inline VI dot_strip(VI sum, const VI (&quad)[4], const std::int32_t* x, int stride) {
#if defined(__SSSE3__)
  V16 small = {};
  for (int j = 0; j < 4; ++j) {
    const VI right = broadcast<VI>(x[j * stride]);
    if constexpr (kSmall) {
      small += pairs(quad[j], right);
    } else {
      sum += add_pairs(pairs(quad[j] & each_byte(127), right), broadcast<V16>(std::int16_t{1}));
      small += pairs((quad[j] >> 7) & each_byte(1), right);
    }
  }
  return sum + add_pairs(small, broadcast<V16>(std::int16_t{kSmall ? 1 : 128}));
#else
  for (int j = 0; j < 4; ++j) {
    const VI right = broadcast<VI>(x[j * stride]);
    if constexpr (kSmall) {
      sum = dot_small(sum, quad[j], right);
    } else {
      sum = dot_small(sum, quad[j] & each_byte(127), right);
      sum += dot_small(VI{}, (quad[j] >> 7) & each_byte(1), right) << 7;
    }
  }
  return sum;
#endif
}

}  // namespace bitwright::BITWRIGHT_ISA_NAME
