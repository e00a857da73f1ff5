// Tiles of AMX: registers of up to 16 rows of 64 bytes, products of two of them added to a third.
//
//   TILE_PAIRS  C[m][n] += sum_k A[m][2k] B[k][2n] + A[m][2k+1] B[k][2n+1], bf16 words; even and
//               odd columns are a chain of float32 multiply-adds each, both added to C at the end;
//               denormals count as 0
//   TILE_BYTES  C[m][n] += sum_k sum_t A[m][4k+t] B[k][4n+t], int8 times uint8
//
// (Intel's instruction set reference, TDPBF16PS and TDPBSUD.) A has 4 bytes of each row for each
// row of B. The numbers of registers must be literals, so these are macros. BITWRIGHT_AMX_EMULATED
// computes the same in plain C++, for tests on processors without.
#pragma once

#include "kernels/simd.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define BITWRIGHT_AMX
#define TILE_ZERO(tile) _tile_zero(tile)
#define TILE_LOAD(tile, from, stride) \
  do {                                \
    seen_by_tiles(from);              \
    _tile_loadd(tile, from, stride);  \
  } while (false)
#define TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define TILE_PAIRS(c, a, b) _tile_dpbf16ps(c, a, b)
#define TILE_BYTES(c, a, b) _tile_dpbsud(c, a, b)
#elif defined(BITWRIGHT_AMX_EMULATED)
#define BITWRIGHT_AMX
#define TILE_ZERO(tile) tile_state.zero(tile)
#define TILE_LOAD(tile, from, stride) tile_state.load(tile, from, stride)
#define TILE_STORE(tile, to, stride) tile_state.store(tile, to, stride)
#define TILE_PAIRS(c, a, b) tile_state.pairs(c, a, b)
#define TILE_BYTES(c, a, b) tile_state.bytes(c, a, b)
#endif

namespace bitwright::BITWRIGHT_ISA_NAME {

#if defined(BITWRIGHT_AMX)
inline constexpr int kTileRows = 16, kTileBytes = 64;
inline constexpr int kMrPairs = kTileRows, kTokensByToken = kTileRows;
inline constexpr bool kPairsByRow = true;

// GCC's tile loads do not tell the compiler that they read memory.
inline void seen_by_tiles(const void* memory) { asm volatile("" ::"r"(memory) : "memory"); }

// What LDTILECFG reads.
struct TileShapes {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes[16] = {};
  std::uint8_t rows[16] = {};

  void set(int tile, int row_count, int row_bytes) {
    rows[tile] = static_cast<std::uint8_t>(row_count);
    bytes[tile] = static_cast<std::uint16_t>(row_bytes);
  }
};
static_assert(sizeof(TileShapes) == 64, "the layout of the instruction");

#if defined(BITWRIGHT_AMX_EMULATED)
struct Tiles {
  TileShapes shape;
  alignas(64) std::uint8_t byte[8][kTileRows][kTileBytes];

  void zero(int tile) { std::memset(byte[tile], 0, sizeof byte[tile]); }
  void load(int tile, const void* from, std::int64_t stride) {
    zero(tile);
    for (int row = 0; row < shape.rows[tile]; ++row)
      std::memcpy(byte[tile][row], static_cast<const char*>(from) + row * stride,
                  shape.bytes[tile]);
  }
  void store(int tile, void* to, std::int64_t stride) const {
    for (int row = 0; row < shape.rows[tile]; ++row)
      std::memcpy(static_cast<char*>(to) + row * stride, byte[tile][row], shape.bytes[tile]);
  }
  float half(int tile, int row, int word) const {
    const std::uint8_t* at = byte[tile][row] + 2 * word;
    std::uint32_t bits = static_cast<std::uint32_t>(at[0] | at[1] << 8) << 16;
    if ((bits & 0x7F800000) == 0) bits &= 0x80000000;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  void pairs(int c, int a, int b) {
    for (int m = 0; m < shape.rows[c]; ++m)
      for (int n = 0; n < shape.bytes[c] / 4; ++n) {
        float sum[2] = {};
        for (int k = 0; k < shape.rows[b]; ++k)
          for (int odd = 0; odd < 2; ++odd)
            sum[odd] = __builtin_fmaf(half(a, m, 2 * k + odd), half(b, k, 2 * n + odd), sum[odd]);
        float value;
        std::memcpy(&value, byte[c][m] + 4 * n, sizeof value);
        value += sum[0] + sum[1];
        std::memcpy(byte[c][m] + 4 * n, &value, sizeof value);
      }
  }
  void bytes(int c, int a, int b) {
    for (int m = 0; m < shape.rows[c]; ++m)
      for (int n = 0; n < shape.bytes[c] / 4; ++n) {
        std::int32_t value;
        std::memcpy(&value, byte[c][m] + 4 * n, sizeof value);
        for (int k = 0; k < shape.rows[b]; ++k)
          for (int t = 0; t < 4; ++t)
            value += static_cast<std::int8_t>(byte[a][m][4 * k + t]) * byte[b][k][4 * n + t];
        std::memcpy(byte[c][m] + 4 * n, &value, sizeof value);
      }
  }
};
inline thread_local Tiles tile_state;
#endif

// The shapes are this thread's until the scope ends; then it has no tiles, as it was before.
class TileScope {
 public:
#if defined(BITWRIGHT_AMX_EMULATED)
  explicit TileScope(const TileShapes& shapes) { tile_state.shape = shapes; }
#else
  explicit TileScope(const TileShapes& shapes) {
    seen_by_tiles(&shapes);
    _tile_loadconfig(&shapes);
  }
  ~TileScope() { _tile_release(); }
#endif
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};
#else
inline constexpr int kMrPairs = kMrF32, kTokensByToken = 0;
inline constexpr bool kPairsByRow = false;
#endif

}  // namespace bitwright::BITWRIGHT_ISA_NAME
