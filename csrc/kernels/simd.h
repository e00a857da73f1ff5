// The few vector operations that the kernels need, at whatever width the compiler flags allow.
//
// V<T> is a GCC/Clang vector type, so + - * / comparisons and ?: are the language's. Only what the
// language lacks is spelled per instruction set: fused multiply-add and rounding to nearest even.
// BITWRIGHT_ISA_NAME is the namespace of the level, given by CMake. Nothing here may be a shared
// inline function of another header (std, Eigen): the linker could keep the copy of a wider level.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace bitwright::BITWRIGHT_ISA_NAME {

#if defined(__AVX512F__)
inline constexpr int kBytes = 64, kMrF32 = 8, kMrF64 = 8, kDotTokens = 13;
#elif defined(__AVX2__)
inline constexpr int kBytes = 32, kMrF32 = 4, kMrF64 = 4, kDotTokens = 4;
#elif defined(__aarch64__)
inline constexpr int kBytes = 16, kMrF32 = 6, kMrF64 = 6, kDotTokens = 8;
#else
inline constexpr int kBytes = 16, kMrF32 = 4, kMrF64 = 3, kDotTokens = 4;
#endif
inline constexpr int kPairTokens = 8;
inline constexpr int kVectors = 3;  // vectors side by side in a panel

using VF = float __attribute__((vector_size(kBytes)));
using VD = double __attribute__((vector_size(kBytes)));
using VI = std::int32_t __attribute__((vector_size(kBytes)));
inline constexpr int kF32 = kBytes / 4, kF64 = kBytes / 8;
inline constexpr int kNrF32 = kVectors * kF32, kNrF64 = kVectors * kF64;

template <class V>
struct __attribute__((packed, may_alias)) Unaligned {
  V value;
};
template <class V, class T>
inline V load(const T* from) {
  return reinterpret_cast<const Unaligned<V>*>(from)->value;
}
template <class V, class T>
inline void store(T* to, V value) {
  reinterpret_cast<Unaligned<V>*>(to)->value = value;
}
template <class V, class T>
inline V broadcast(T value) {
  return value - V{};  // not V{} + value: that would have to turn -0 into +0
}

#if defined(__AVX512F__)
inline VF fma(VF a, VF b, VF c) { return (VF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline VD fma(VD a, VD b, VD c) { return (VD)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
inline VF rint(VF x) {
  return (VF)_mm512_maskz_roundscale_ps(0xFFFF, (__m512)x,
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__AVX2__)
inline VF fma(VF a, VF b, VF c) { return (VF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline VD fma(VD a, VD b, VD c) { return (VD)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
inline VF rint(VF x) {
  return (VF)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__aarch64__)
inline VF fma(VF a, VF b, VF c) {
  return (VF)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
inline VD fma(VD a, VD b, VD c) {
  return (VD)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
inline VF rint(VF x) { return (VF)vrndnq_f32((float32x4_t)x); }
#else
inline VF fma(VF a, VF b, VF c) { return a * b + c; }
inline VD fma(VD a, VD b, VD c) { return a * b + c; }
inline VF rint(VF x) {
  return (VF)_mm_round_ps((__m128)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#endif

// sum + the two products of a pair of bf16 words in each lane, as the machine rounds them.
#if defined(__AVX512BF16__)
#define BITWRIGHT_BF16_PAIRS
inline VF dot_pairs(VF sum, VI a, VI b) {
  return (VF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
}
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define BITWRIGHT_BF16_PAIRS
inline VF dot_pairs(VF sum, VI a, VI b) {
  return (VF)vbfdotq_f32((float32x4_t)sum, vreinterpretq_bf16_s32((int32x4_t)a),
                         vreinterpretq_bf16_s32((int32x4_t)b));
}
#endif

inline VF minimum(VF a, VF b) { return a < b ? a : b; }
inline VF maximum(VF a, VF b) { return a > b ? a : b; }
inline VF absolute(VF x) { return x < 0.0F ? -x : x; }

}  // namespace bitwright::BITWRIGHT_ISA_NAME
