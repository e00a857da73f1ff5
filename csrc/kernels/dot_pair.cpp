// Two panels times int8 tokens, 32 rows x up to kPairTokens tokens: a token's quad is fetched once
// for both, so that the multipliers and not the loads set the pace; codes and scales were unpacked
// before, once for many tokens. What is not whole yet lies in memory: the integer sums of a segment
// are all that fills registers. Sums and their order are those of dot_tile.
#include "kernels/int8.h"
#include "kernels/table.h"

#if defined(BITWRIGHT_PAIR)

namespace bitwright::BITWRIGHT_ISA_NAME {

namespace {

constexpr int kPair = 2;
static_assert(kParts == 1, "a vector holds the rows of a panel");
static_assert(kPairTokens <= kDotTokens, "dot_tile takes the panel that is left without another");

template <int kTokens, Zeros kZeros>
struct PairTile {
  const DotPair& pair;
  const DotTokens& x;
  float *sums, *out;

  static float* at(float* rows, int t, int p) { return rows + (t * kPair + p) * kF32; }

  void run() const {
    const PanelLayout& layout = *pair.layout;
    const std::int64_t whole = layout.group_strips, first_group = pair.begin / whole;
    const std::int64_t each = (whole + x.segment - 1) / x.segment;
    std::int64_t number = first_group * each + (pair.begin - first_group * whole) / x.segment;
    std::int64_t finer = 0;
    while (finer < x.finer_count && x.finer[finer] < number) ++finer;
    if (pair.begin == 0)
      for (int i = 0; i < kTokens * kPair; ++i) store(out + i * kF32, VF{});
    std::int64_t strip = pair.begin;
    for (std::int64_t g = first_group; strip < pair.end; ++g) {
      const std::int64_t first = g * whole;
      const std::int64_t last = first + whole < layout.strips ? first + whole : layout.strips;
      Part part{(g - first_group) * kPair * kF32, x.shift + g * kTokens, 0, 0, false, false};
      for (; strip < last && strip < pair.end; strip = part.stop, ++number) {
        part.begin = strip;
        part.stop = strip + x.segment < last ? strip + x.segment : last;
        const bool more = finer < x.finer_count && x.finer[finer] == number;
        part.starts = strip == first;
        part.ends = part.stop == last && !more;
        multiply(part, x.quads + strip * 4 * kTokens, x.scale + number * kTokens);
        if (!more) continue;
        part.starts = false;
        part.ends = part.stop == last;
        multiply(part, x.finer_quads + finer * x.segment * 4 * kTokens,
                 x.finer_scale + finer * kTokens);
        ++finer;
      }
    }
    if (x.per_token && pair.end == layout.strips)
      for (int i = 0; i < kTokens * kPair; ++i)
        store(out + i * kF32, load<VF>(out + i * kF32) * x.scale[i / kPair]);
  }

  // A segment: where its group's scales lie, what that takes away, whether it is its first, last.
  struct Part {
    std::int64_t group;
    const float* shift;
    std::int64_t begin, stop;
    bool starts, ends;
  };

  __attribute__((always_inline)) inline void multiply(const Part& part, const std::int32_t* quads,
                                                      const float* scale) const {
    VI segment[kPair][kTokens] = {};
    const std::uint8_t* codes = pair.quads + (part.begin - pair.begin) * 4 * kPair * kBytes;
    for (std::int64_t s = part.begin; s < part.stop; ++s)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j, quads += kTokens, codes += kPair * kBytes) {
        const VI low = load<VI>(codes), high = load<VI>(codes + kBytes);
#pragma GCC unroll 16
        for (int t = 0; t < kTokens; ++t) {
          VI four = broadcast<VI>(quads[t]);
          asm("" : "+v"(four));  // in a register: one load for both products
          segment[0][t] = dot4(segment[0][t], low, four);
          segment[1][t] = dot4(segment[1][t], high, four);
        }
      }
#pragma GCC unroll 2
    for (int p = 0; p < kPair; ++p) {
      VF sum[kTokens];
      if (part.starts) {
        start(part, p, sum);
      } else {
        for (int t = 0; t < kTokens; ++t) sum[t] = load<VF>(at(sums, t, p));
      }
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        const VF more = __builtin_convertvector(segment[p][t], VF);
        sum[t] = x.per_token ? sum[t] + more : fma(more, broadcast<VF>(scale[t]), sum[t]);
      }
      if (part.ends) {
        finish(part, p, sum);
      } else {
        for (int t = 0; t < kTokens; ++t) store(at(sums, t, p), sum[t]);
      }
    }
  }

  inline void start(const Part& part, int p, VF (&sum)[kTokens]) const {
    const VF zero = load<VF>(pair.zeros + part.group + p * kF32);
    for (int t = 0; t < kTokens; ++t) {
      sum[t] = VF{};
      if constexpr (kZeros == Zeros::kMiddle) sum[t] = broadcast<VF>(part.shift[t]);
      if constexpr (kZeros == Zeros::kBytes) sum[t] = zero * part.shift[t];
    }
  }

  inline void finish(const Part& part, int p, const VF (&sum)[kTokens]) const {
    const VF scale = load<VF>(pair.scales + part.group + p * kF32);
    const VF offset = load<VF>(pair.zeros + part.group + p * kF32);
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
      VF all = fma(sum[t], scale, load<VF>(at(out, t, p)));
      if constexpr (kZeros == Zeros::kOffsets) all = fma(offset, broadcast<VF>(part.shift[t]), all);
      store(at(out, t, p), all);
    }
  }
};

template <Zeros kZeros, int kTokens = kPairTokens>
void multiply(const DotPair& pair, const DotTokens& x, float* sums, float* out) {
  if constexpr (kTokens > 0) {
    if (x.tokens < kTokens) return multiply<kZeros, kTokens - 1>(pair, x, sums, out);
    PairTile<kTokens, kZeros>{pair, x, sums, out}.run();
  }
}

template <int kWidth, bool kTable>
void unpack(const DotPair& pair) {
  for (int p = 0; p < kPair; ++p) {
    const std::uint8_t* codes = pair.panel[p] + pair.layout->codes_at;
    std::uint8_t* to = pair.quads + p * kBytes;
    for (std::int64_t s = pair.begin; s < pair.end; ++s) {
      VI quad[4];
      load_strip<kWidth>(codes, s, 0, quad);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j, to += kPair * kBytes)
        store(to, kTable ? look_up_bytes(pair.layout->dot_levels, quad[j]) : quad[j]);
    }
  }
}

}  // namespace

void unpack_pair(const DotPair& pair) {
  const PanelLayout& layout = *pair.layout;
  const std::int64_t first = pair.begin / layout.group_strips;
  for (std::int64_t g = first; g * layout.group_strips < pair.end; ++g)
    for (int p = 0; p < kPair; ++p) {
      const std::int64_t to = ((g - first) * kPair + p) * kF32;
      store(pair.scales + to, load_scales(layout, pair.panel[p], 0, g, 0) * layout.unit);
      store(pair.zeros + to, load_zeros(layout, pair.panel[p], g, 0));
    }
  if (layout.table) return unpack<4, true>(pair);
  if (layout.width == 2) return unpack<2, false>(pair);
  if (layout.width == 3) return unpack<3, false>(pair);
  if (layout.width == 4) return unpack<4, false>(pair);
  unpack<8, false>(pair);
}

void dot_pair(const DotPair& pair, const DotTokens& x, float* sums, float* out) {
  if (pair.layout->zeros == Zeros::kMiddle) return multiply<Zeros::kMiddle>(pair, x, sums, out);
  if (pair.layout->zeros == Zeros::kBytes) return multiply<Zeros::kBytes>(pair, x, sums, out);
  multiply<Zeros::kOffsets>(pair, x, sums, out);
}

}  // namespace bitwright::BITWRIGHT_ISA_NAME

#endif
