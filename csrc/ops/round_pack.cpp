// Rounding to nearest straight to packed words: a row is widened, fitted, rounded and packed while
// it is in cache, and no array of floats or codes is left behind. The same scales, zero points and
// codes as fit, encode and pack, one after the other.
#include <algorithm>
#include <cmath>

#include "core/half.h"
#include "core/parallel.h"
#include "ops.h"
#include "ops/bitstream.h"
#include "ops/fit_options.h"
#include "ops/panel.h"

namespace bitwright {

namespace {

constexpr Index kRowsPerTask = 16;
constexpr Index kLine = 64;  // bytes

void widen(const float* from, Index k, bool, float* to) { std::copy(from, from + k, to); }
void widen(const std::uint16_t* from, Index k, bool bf16, float* to) {
  if (bf16) return table().widen_bf16(k, from, to);
  for (Index j = 0; j < k; ++j) to[j] = from_fp16(from[j]);
}

bool damaged_row(const float* row, Index k, bool) { return damaged(row, k); }

// As integers, like damaged(): above 2^56, or what is finite in fp16.
bool damaged_row(const std::uint16_t* row, Index k, bool bf16) {
  const int most = bf16 ? 0x5B80 : 0x7BFF;
  std::int16_t any = 0;
  for (Index j = 0; j < k; ++j)
    any = static_cast<std::int16_t>(any | static_cast<std::int16_t>(most - (row[j] & 0x7FFF)));
  return any < 0;
}

void require_row(const float* row, Index k, Index r) {
  for (Index j = 0; j < k; ++j)
    require(std::abs(row[j]) <= static_cast<float>(kLargest),
            "[round_pack] W must be finite and at most 2^56, got ", row[j], " at (", r, ", ", j,
            ")");
}

template <class T>
void rows(In<T> w, bool bf16, const FitSettings& settings, Out<float> scales, Out<float> zeros,
          Out<std::uint32_t> words) {
  const Index n = w.rows(), k = w.cols(), wide = ceil_div(k * settings.grid.bits, 32);
  require_codes("round_pack", n, k, settings.group, scales, zeros);
  require(words.rows() == n && words.cols() == wide, "[round_pack] words must be ", n, " x ", wide,
          ", got ", words.rows(), " x ", words.cols());
  const Eigen::VectorXf none;
  const GridLevels levels(settings.grid);
  require(
      levels.get() == nullptr && !settings.grid.offset && settings.block == 0 && !settings.search,
      "[round_pack] the grid must be of integers with zero points and one level of scales");
  const FitOptions options = fit_options(settings, levels, none);
  parallel_for(ceil_div(n, kRowsPerTask), [&](Index task) {
    Buffer<float> row(k);
    Buffer<std::uint8_t> codes(k);
    for (Index r = task * kRowsPerTask; r < std::min(n, (task + 1) * kRowsPerTask); ++r) {
      const T* from = w.data() + r * w.outerStride();
      widen(from, k, bf16, row.get());
      if (damaged_row(from, k, bf16)) require_row(row.get(), k, r);
      if (r + 1 < n)
        for (Index j = 0; j < k; j += kLine / Index{sizeof(T)})
          __builtin_prefetch(from + w.outerStride() + j);
      table().round_row(options, k, settings.group, row.get(), &scales(r, 0), &zeros(r, 0),
                        codes.get());
      write_bits(codes.get(), k, settings.grid.bits, words.data() + r * words.outerStride());
    }
  });
}

}  // namespace

void round_pack_f32(In<float> w, const FitSettings& settings, Out<float> scales, Out<float> zeros,
                    Out<std::uint32_t> words) {
  rows<float>(w, false, settings, scales, zeros, words);
}
void round_pack_u16(In<std::uint16_t> w, bool bf16, const FitSettings& settings, Out<float> scales,
                    Out<float> zeros, Out<std::uint32_t> words) {
  rows<std::uint16_t>(w, bf16, settings, scales, zeros, words);
}

}  // namespace bitwright
