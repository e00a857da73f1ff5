// Products of panels: the register tiles, and their results added up in double.
#include "kernels/tile.h"

#include "kernels/table.h"

namespace bitwright::BITWRIGHT_ISA_NAME {

namespace {

template <class V, int kRows, class T>
inline void tile(std::int64_t k, const T* a, std::int64_t lda, const T* b, T* c, std::int64_t ldc) {
  V sum[kRows][kVectors];
  load_tile<V, kRows>(sum, c, ldc);
  add_products<V, kRows>(sum, k, a, lda, b);
  store_tile<V, kRows>(sum, c, ldc);
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

#if defined(BITWRIGHT_BF16_PAIRS)
void tile_bf16(std::int64_t pairs, const std::uint32_t* a, std::int64_t lda, const std::uint32_t* b,
               float* c, std::int64_t ldc) {
  VF sum[kMrF32][kVectors];
  load_tile<VF, kMrF32>(sum, c, ldc);
  for (std::int64_t p = 0; p < pairs; ++p, a += lda, b += kNrF32) {
    VI right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = load<VI>(b + v * kF32);
    for (int i = 0; i < kMrF32; ++i) {
      const VI left = broadcast<VI>(static_cast<std::int32_t>(a[i]));
      for (int v = 0; v < kVectors; ++v) sum[i][v] = dot_pairs(sum[i][v], left, right[v]);
    }
  }
  store_tile<VF, kMrF32>(sum, c, ldc);
}
#endif

void widen_add(std::int64_t rows, std::int64_t columns, const float* c, std::int64_t ldc, double* h,
               std::int64_t ldh) {
  for (std::int64_t i = 0; i < rows; ++i, c += ldc, h += ldh)
    for (std::int64_t j = 0; j < columns; ++j) h[j] += static_cast<double>(c[j]);
}

}  // namespace bitwright::BITWRIGHT_ISA_NAME
