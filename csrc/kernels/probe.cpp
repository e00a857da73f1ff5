// What a core can do at most: multiply-add chains that never leave the registers, and a read that
// does nothing but add words. A chain waits 4 to 5 cycles for its last result and a core starts up
// to two of them per cycle, so a block runs 24 vectors side by side (12 where there are 16
// registers).
#include "kernels/simd.h"
#include "kernels/table.h"

namespace bitwright::BITWRIGHT_ISA_NAME {

namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8;
#else
constexpr int kRows = 4;
#endif
constexpr int kChains = kRows * kVectors;
static_assert(1536 % (kChains * kBytes) == 0, "blocks of every level must divide the op's");

template <class V, class T, class Step>
inline void chains(std::int64_t count, std::int64_t rounds, T* x, const Step& step) {
  constexpr int kLanes = kBytes / static_cast<int>(sizeof(T));
  for (std::int64_t i = 0; i < count; i += kChains * kLanes) {
    V value[kRows][kVectors];  // as in the tile: in registers, where one loop of 24 would be kept
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) value[r][v] = load<V>(x + i + (r * kVectors + v) * kLanes);
    for (std::int64_t round = 0; round < rounds; ++round)
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) value[r][v] = step(value[r][v]);
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) store(x + i + (r * kVectors + v) * kLanes, value[r][v]);
  }
}

}  // namespace

void chain_f32(std::int64_t count, std::int64_t rounds, float a, float b, float* x) {
  const VF factor = broadcast<VF>(a), term = broadcast<VF>(b);
  chains<VF>(count, rounds, x, [&](VF v) { return fma(v, factor, term); });
}

void chain_f64(std::int64_t count, std::int64_t rounds, double a, double b, double* x) {
  const VD factor = broadcast<VD>(a), term = broadcast<VD>(b);
  chains<VD>(count, rounds, x, [&](VD v) { return fma(v, factor, term); });
}

#if defined(BITWRIGHT_BF16_PAIRS)
void chain_bf16(std::int64_t count, std::int64_t rounds, std::uint32_t a, std::uint32_t b,
                float* x) {
  const VI left = broadcast<VI>(static_cast<std::int32_t>(a));
  const VI right = broadcast<VI>(static_cast<std::int32_t>(b));
  chains<VF>(count, rounds, x, [&](VF v) { return dot_pairs(v, left, right); });
}
#endif

void word_sum(std::int64_t count, const std::uint64_t* x, std::uint64_t* sum) {
  using VU = std::uint64_t __attribute__((vector_size(kBytes)));
  constexpr int kLanes = kBytes / 8, kSums = 8;
  VU sums[kSums] = {};
  std::int64_t i = 0;
  for (; i + kSums * kLanes <= count; i += kSums * kLanes)
    for (int s = 0; s < kSums; ++s) sums[s] += load<VU>(x + i + s * kLanes);
  for (int s = 1; s < kSums; ++s) sums[0] += sums[s];
  for (int lane = 0; lane < kLanes; ++lane) *sum += sums[0][lane];
  for (; i < count; ++i) *sum += x[i];
}

}  // namespace bitwright::BITWRIGHT_ISA_NAME
