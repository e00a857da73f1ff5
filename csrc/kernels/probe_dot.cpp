// What a core can do at most in sums of four int8 products, in registers; kernels/probe.cpp has the
// reasoning. Without an instruction for it, what dot.cpp does instead.
#include "kernels/int8.h"
#include "kernels/table.h"

namespace bitwright::BITWRIGHT_ISA_NAME {

namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8;
#else
constexpr int kRows = 4;
#endif
constexpr int kChains = kRows * kVectors;

inline VI one_dot(VI sum, VI codes, VI bytes) {
  if constexpr (kVnni) return dot4(sum, codes, bytes);
#if defined(__SSSE3__)
  return sum + add_pairs(pairs(codes, bytes), broadcast<V16>(std::int16_t{1}));
#else
  return dot_small(sum, codes, bytes);
#endif
}

// Hides from the compiler that the products are the same in every round.
inline void renew(VI& value) {
#if defined(__x86_64__)
  asm volatile("" : "+x"(value));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(value));
#endif
}

}  // namespace

void dot_chain(std::int64_t count, std::int64_t rounds, std::int32_t code, std::int32_t byte,
               std::int32_t* x) {
  VI codes = each_byte(code), bytes = (VI)broadcast<VI>((byte & 255) * 0x01010101);
  for (std::int64_t i = 0; i < count; i += kChains * kF32) {
    VI sum[kRows][kVectors];
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) sum[r][v] = load<VI>(x + i + (r * kVectors + v) * kF32);
    for (std::int64_t round = 0; round < rounds; ++round) {
      renew(codes);
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) sum[r][v] = one_dot(sum[r][v], codes, bytes);
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) store(x + i + (r * kVectors + v) * kF32, sum[r][v]);
  }
}

}  // namespace bitwright::BITWRIGHT_ISA_NAME
