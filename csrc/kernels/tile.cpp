// The register tile: mr x nr results stay in registers while k runs; 3 loads and mr broadcasts feed
// 3 mr multiply-adds. Eight rows of three 512-bit vectors use 24 of 32 registers.
#include "kernels/simd.h"
#include "kernels/table.h"

namespace bitwright::BITWRIGHT_ISA_NAME {

namespace {

template <class V, int kRows, class T>
inline void tile(std::int64_t k, const T* a, std::int64_t lda, const T* b, T* c, std::int64_t ldc) {
  constexpr int kLanes = kBytes / static_cast<int>(sizeof(T));
  V sum[kRows][kVectors];
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kVectors; ++v) sum[i][v] = load<V>(c + i * ldc + v * kLanes);
  for (std::int64_t p = 0; p < k; ++p, a += lda, b += kVectors * kLanes) {
    V right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = load<V>(b + v * kLanes);
    for (int i = 0; i < kRows; ++i) {
      const V left = broadcast<V>(a[i]);
      for (int v = 0; v < kVectors; ++v) sum[i][v] = fma(left, right[v], sum[i][v]);
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kVectors; ++v) store(c + i * ldc + v * kLanes, sum[i][v]);
}

}  // namespace

void tile_f32(std::int64_t k, const float* a, std::int64_t lda, const float* b, float* c,
              std::int64_t ldc) {
  tile<VF, kMrF32>(k, a, lda, b, c, ldc);
}

void tile_f64(std::int64_t k, const double* a, std::int64_t lda, const double* b, double* c,
              std::int64_t ldc) {
  tile<VD, kMrF64>(k, a, lda, b, c, ldc);
}

#if defined(__AVX512BF16__)
void tile_bf16(std::int64_t pairs, const std::uint32_t* a, std::int64_t lda, const std::uint32_t* b,
               float* c, std::int64_t ldc) {
  VF sum[kMrF32][kVectors];
  for (int i = 0; i < kMrF32; ++i)
    for (int v = 0; v < kVectors; ++v) sum[i][v] = load<VF>(c + i * ldc + v * kF32);
  for (std::int64_t p = 0; p < pairs; ++p, a += lda, b += kNrF32) {
    __m512bh right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = (__m512bh)_mm512_loadu_si512(b + v * kF32);
    for (int i = 0; i < kMrF32; ++i) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[i]));
      for (int v = 0; v < kVectors; ++v)
        sum[i][v] = (VF)_mm512_dpbf16_ps((__m512)sum[i][v], left, right[v]);
    }
  }
  for (int i = 0; i < kMrF32; ++i)
    for (int v = 0; v < kVectors; ++v) store(c + i * ldc + v * kF32, sum[i][v]);
}
#endif

void widen_add(std::int64_t rows, std::int64_t columns, const float* c, std::int64_t ldc, double* h,
               std::int64_t ldh) {
  for (std::int64_t i = 0; i < rows; ++i, c += ldc, h += ldh)
    for (std::int64_t j = 0; j < columns; ++j) h[j] += static_cast<double>(c[j]);
}

namespace {

inline double root(double x) {
#if defined(__x86_64__)
  return _mm_cvtsd_f64(_mm_sqrt_pd(_mm_set1_pd(x)));
#else
  return __builtin_sqrt(x);
#endif
}

}  // namespace

void cholesky_f64(std::int64_t n, double* x, bool* positive) {
  for (std::int64_t j = 0; j < n; ++j) {
    double* column = x + j * n;
    for (std::int64_t i = j / kNrF64 * kNrF64; i < n; i += kNrF64) {
      VD sum[kVectors];
      for (int v = 0; v < kVectors; ++v) sum[v] = load<VD>(column + i + v * kF64);
      for (std::int64_t m = 0; m < j; ++m) {
        const VD factor = broadcast<VD>(-x[m * n + j]);
        for (int v = 0; v < kVectors; ++v)
          sum[v] = fma(factor, load<VD>(x + m * n + i + v * kF64), sum[v]);
      }
      for (int v = 0; v < kVectors; ++v) store(column + i + v * kF64, sum[v]);
    }
    const double pivot = column[j];
    if (!(pivot > 0.0 && pivot <= __DBL_MAX__)) {
      *positive = false;
      return;
    }
    const double diagonal = root(pivot);
    for (std::int64_t i = j; i < n; ++i) column[i] = i == j ? diagonal : column[i] / diagonal;
  }
}

void solve_lower_f64(std::int64_t n, const double* lower, double* x) {
  for (std::int64_t j = 0; j < n; ++j) {
    VD sum[kVectors];
    for (int v = 0; v < kVectors; ++v) sum[v] = load<VD>(x + j * kNrF64 + v * kF64);
    for (std::int64_t m = 0; m < j; ++m) {
      const VD factor = broadcast<VD>(-lower[j * n + m]);
      for (int v = 0; v < kVectors; ++v)
        sum[v] = fma(factor, load<VD>(x + m * kNrF64 + v * kF64), sum[v]);
    }
    const VD diagonal = broadcast<VD>(lower[j * n + j]);
    for (int v = 0; v < kVectors; ++v) store(x + j * kNrF64 + v * kF64, sum[v] / diagonal);
  }
}

}  // namespace bitwright::BITWRIGHT_ISA_NAME
