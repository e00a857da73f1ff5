// The register tile: kRows x kVectors results stay in registers while k runs; kVectors loads and
// kRows broadcasts feed kRows * kVectors multiply-adds. Eight rows of three 512-bit vectors use 24
// of 32 registers.
#pragma once

#include "kernels/simd.h"

namespace bitwright::BITWRIGHT_ISA_NAME {

template <class V>
inline constexpr int kLanesOf = kBytes / static_cast<int>(sizeof(V{}[0]));

template <class V, int kRows, class T>
inline void load_tile(V (&sum)[kRows][kVectors], const T* c, std::int64_t ldc) {
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) sum[i][v] = load<V>(c + i * ldc + v * kLanesOf<V>);
}

template <class V, int kRows, class T>
inline void store_tile(const V (&sum)[kRows][kVectors], T* c, std::int64_t ldc) {
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) store(c + i * ldc + v * kLanesOf<V>, sum[i][v]);
}

// sum += A B over k; A is [k][kRows] with stride lda, B is [k][nr].
template <class V, int kRows, class T>
inline void add_products(V (&sum)[kRows][kVectors], std::int64_t k, const T* a, std::int64_t lda,
                         const T* b) {
  for (std::int64_t p = 0; p < k; ++p, a += lda, b += kVectors * kLanesOf<V>) {
    V right[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) right[v] = load<V>(b + v * kLanesOf<V>);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const V left = broadcast<V>(a[i]);
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sum[i][v] = fma(left, right[v], sum[i][v]);
    }
  }
}

}  // namespace bitwright::BITWRIGHT_ISA_NAME
