// Reading the panels of packed.h: codes as quads of bytes, scales and zero points as floats, at the
// vector width of the level. A panel's 16 rows are kParts vectors.
#pragma once

#include "kernels/packed.h"
#include "kernels/simd.h"

namespace bitwright::BITWRIGHT_ISA_NAME {

inline constexpr int kParts = 64 / kBytes;

inline VI each_byte(int value) { return broadcast<VI>(value * 0x01010101); }

template <int kWidth>
inline void load_strip(const std::uint8_t* codes, std::int64_t strip, int part, VI (&quad)[4]) {
  const std::uint8_t* at = codes + part * kBytes;
  if constexpr (kWidth == 8) {
    for (int j = 0; j < 4; ++j) quad[j] = load<VI>(at + (strip * 4 + j) * 64);
  } else if constexpr (kWidth == 4) {
    for (int j = 0; j < 2; ++j) {
      const VI unit = load<VI>(at + (strip * 2 + j) * 64);
      quad[2 * j] = unit & each_byte(15);
      quad[2 * j + 1] = (unit >> 4) & each_byte(15);
    }
  } else {
    const std::uint8_t* pair = at + strip / 2 * 192;
    const VI low = load<VI>(kWidth == 2 ? at + strip * 64 : pair + strip % 2 * 64);
    for (int j = 0; j < 4; ++j) quad[j] = (low >> (2 * j)) & each_byte(3);
    if constexpr (kWidth == 3) {
      const VI high = load<VI>(pair + 128) >> static_cast<int>(strip % 2 * 4);
      for (int j = 0; j < 4; ++j) quad[j] |= ((high >> j) & each_byte(1)) << 2;
    }
  }
}

// Codes of another panel to L2, while this one's are multiplied: panels are long, and hardware
// stops at every page.
template <int kWidth>
inline void prefetch_strip(const std::uint8_t* codes, std::int64_t strip) {
  for (int line = 0; line < kWidth / 2; ++line)
    __builtin_prefetch(codes + (strip * (kWidth / 2) + line) * 64, 0, 2);
}

// Likewise the scales of a group, and its zero points.
inline void prefetch_group(const PanelLayout& layout, const std::uint8_t* panel, std::int64_t g) {
  const std::int64_t row = g * kPanelRows;
  const int bytes = layout.scale == ScaleWords::kFloat32 ? 4 : 2;
  __builtin_prefetch(panel + row * bytes, 0, 2);
  if (layout.zeros == Zeros::kBytes) __builtin_prefetch(panel + layout.zeros_at + row, 0, 2);
  if (layout.zeros == Zeros::kOffsets)
    __builtin_prefetch(panel + layout.zeros_at + row * bytes, 0, 2);
}

// Entry `code` of a table of 16 floats; only the low 4 bits of a code count.
inline VF look_up(const float* table, VI code) {
#if defined(__AVX512F__)
  return (VF)_mm512_maskz_permutexvar_ps(0xFFFF, (__m512i)code, _mm512_loadu_ps(table));
#elif defined(__AVX2__)
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)code);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)code);
  return (VF)_mm256_blendv_ps(low, high, (__m256)(code << 28));
#else
  VF found = {};
  for (int lane = 0; lane < kF32; ++lane) found[lane] = table[code[lane] & 15];
  return found;
#endif
}

// bf16 or fp16 words as floats, exact for every finite one; core/half.h has the reasoning.
inline VF widen(const std::uint8_t* words, bool bf16) {
  using Words = std::uint16_t __attribute__((vector_size(kF32 * 2)));
#if defined(__AVX512F__)  // compilers make two halves of the conversion below
  const VI word = (VI)_mm512_maskz_cvtepu16_epi32(0xFFFF, (__m256i)load<Words>(words));
#else
  const VI word = __builtin_convertvector(load<Words>(words), VI);
#endif
  if (bf16) return (VF)(word << 16);
  const VI sign = (word & 0x8000) << 16, rest = (word & 0x7FFF) << 13;
  const VI finite = (VI)((VF)rest * 0x1p112F);
  return (VF)(sign | ((word & 0x7C00) == 0x7C00 ? rest | 0x7F800000 : finite));
}

// Scales of group g, or its offsets where `at` is layout.zeros_at.
inline VF load_scales(const PanelLayout& layout, const std::uint8_t* panel, std::int64_t at,
                      std::int64_t g, int part) {
  const std::int64_t first = g * kPanelRows + part * kF32;
  if (layout.scale == ScaleWords::kFloat32) return load<VF>(panel + at + first * 4);
  return widen(panel + at + first * 2, layout.scale == ScaleWords::kBf16);
}

inline VI load_bytes(const std::uint8_t* bytes) {
  using Bytes = std::uint8_t __attribute__((vector_size(kF32)));
  return __builtin_convertvector(load<Bytes>(bytes), VI);
}

inline VF load_zeros(const PanelLayout& layout, const std::uint8_t* panel, std::int64_t g,
                     int part) {
  if (layout.zeros == Zeros::kMiddle) return broadcast<VF>(layout.middle);
  if (layout.zeros == Zeros::kOffsets) return load_scales(layout, panel, layout.zeros_at, g, part);
  return __builtin_convertvector(load_bytes(panel + layout.zeros_at + g * kPanelRows + part * kF32),
                                 VF);
}

}  // namespace bitwright::BITWRIGHT_ISA_NAME
