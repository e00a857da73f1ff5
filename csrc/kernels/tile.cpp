// Products of panels: the register tiles, and their results added up in double.
#include "kernels/tile.h"

#include "kernels/amx.h"
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

void tile_f32_of(std::int64_t k, const std::int32_t* rows, const float* a, std::int64_t lda,
                 const float* b, float* c, std::int64_t ldc) {
  VF sum[kMrF32][kVectors];
  load_tile<VF, kMrF32>(sum, c, ldc);
  for (std::int64_t p = 0; p < k; ++p)
    add_products<VF, kMrF32>(sum, 1, a + rows[p] * lda, lda, b + p * kNrF32);
  store_tile<VF, kMrF32>(sum, c, ldc);
}

void tile_f64(std::int64_t k, const double* a, std::int64_t lda, const double* b, double* c,
              std::int64_t ldc) {
  tile<VD, kMrF64>(k, a, lda, b, c, ldc);
}

#if defined(BITWRIGHT_AMX)
namespace {

// Up to 16 pairs at a time; the shapes say how many.
inline void add_tiles(std::int64_t pairs, const std::uint32_t* a, std::int64_t lda,
                      const std::uint32_t* b, float* c, std::int64_t ldc) {
  const int step = pairs < kTileRows ? static_cast<int>(pairs) : kTileRows;
  TileShapes shapes;
  for (int tile = 0; tile < kVectors; ++tile) {
    shapes.set(tile, kTileRows, kTileBytes);
    shapes.set(4 + tile, step, kTileBytes);
  }
  shapes.set(3, kTileRows, 4 * step);
  const TileScope scope(shapes);
  TILE_LOAD(0, c, ldc * 4);
  TILE_LOAD(1, c + 16, ldc * 4);
  TILE_LOAD(2, c + 32, ldc * 4);
  for (std::int64_t p = 0; p < pairs; p += step, a += step, b += step * kNrF32) {
    TILE_LOAD(3, a, lda * 4);
    TILE_LOAD(4, b, kNrF32 * 4);
    TILE_PAIRS(0, 3, 4);
    TILE_LOAD(5, b + 16, kNrF32 * 4);
    TILE_PAIRS(1, 3, 5);
    TILE_LOAD(6, b + 32, kNrF32 * 4);
    TILE_PAIRS(2, 3, 6);
  }
  TILE_STORE(0, c, ldc * 4);
  TILE_STORE(1, c + 16, ldc * 4);
  TILE_STORE(2, c + 32, ldc * 4);
}

}  // namespace

void tile_bf16(std::int64_t pairs, const std::uint32_t* a, std::int64_t lda, const std::uint32_t* b,
               float* c, std::int64_t ldc) {
  static_assert(kNrF32 == 48 && kMrPairs == kTileRows, "three tiles side by side");
  const std::int64_t whole = pairs / kTileRows * kTileRows;
  if (whole > 0) add_tiles(whole, a, lda, b, c, ldc);
  if (whole < pairs) add_tiles(pairs - whole, a + whole, lda, b + whole * kNrF32, c, ldc);
}
#elif defined(BITWRIGHT_BF16_PAIRS)
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
