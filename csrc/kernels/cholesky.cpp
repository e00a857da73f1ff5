// Cholesky inside one panel of nr rows, columns side by side, [column][nr]. Matrices come negated,
// because the tiles add: each result is the chain -a + l l' + ... over ascending columns, divided
// by minus the pivot.
#include "kernels/table.h"
#include "kernels/tile.h"

namespace bitwright::BITWRIGHT_ISA_NAME {

namespace {

inline double root(double x) {
#if defined(__x86_64__)
  return _mm_cvtsd_f64(_mm_sqrt_pd(_mm_set1_pd(x)));
#else
  return __builtin_sqrt(x);
#endif
}

}  // namespace

void cholesky_f64(double* x, bool* positive) {
  for (std::int64_t j = 0; j < kNrF64; ++j) {
    double* column = x + j * kNrF64;
    VD sum[kVectors];
    for (int v = 0; v < kVectors; ++v) sum[v] = load<VD>(column + v * kF64);
    for (std::int64_t m = 0; m < j; ++m) {
      const VD factor = broadcast<VD>(x[m * kNrF64 + j]);
      for (int v = 0; v < kVectors; ++v)
        sum[v] = fma(factor, load<VD>(x + m * kNrF64 + v * kF64), sum[v]);
    }
    for (int v = 0; v < kVectors; ++v) store(column + v * kF64, sum[v]);
    const double pivot = -column[j];
    if (!(pivot > 0.0 && pivot <= __DBL_MAX__)) {
      *positive = false;
      return;
    }
    const double diagonal = root(pivot);
    const VD divisor = broadcast<VD>(-diagonal);
    for (int v = 0; v < kVectors; ++v) store(column + v * kF64, sum[v] / divisor);
    column[j] = diagonal;
  }
}

void solve_lower_f64(const double* lower, double* x) {
  for (int first = 0; first < kNrF64; first += kMrF64) {
    const double* l = lower + first * kNrF64 + first;
    VD sum[kMrF64][kVectors];
    load_tile<VD, kMrF64>(sum, x + first * kNrF64, kNrF64);
    add_products<VD, kMrF64>(sum, first, lower + first, kNrF64, x);
#pragma GCC unroll 8
    for (int i = 0; i < kMrF64; ++i) {
      const VD divisor = broadcast<VD>(-l[i * kNrF64 + i]);
      for (int v = 0; v < kVectors; ++v) sum[i][v] = sum[i][v] / divisor;
#pragma GCC unroll 8
      for (int j = i + 1; j < kMrF64; ++j) {
        const VD factor = broadcast<VD>(l[i * kNrF64 + j]);
        for (int v = 0; v < kVectors; ++v) sum[j][v] = fma(factor, sum[i][v], sum[j][v]);
      }
    }
    store_tile<VD, kMrF64>(sum, x + first * kNrF64, kNrF64);
  }
}

}  // namespace bitwright::BITWRIGHT_ISA_NAME
