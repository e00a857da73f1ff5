// Panels times int8 tokens: integer sums over a segment in registers, 16 rows x up to kDotTokens
// tokens, then per segment, in ascending order, y = fma(sum, weight scale * token scale, y).
#include "kernels/int8.h"
#include "kernels/table.h"

namespace bitwright::BITWRIGHT_ISA_NAME {

namespace {

// Independent sums per token, so that few tokens do not wait for each other's latency.
template <int kTokens>
inline constexpr int kChains = kVnni ? (kTokens >= 8   ? 1
                                        : kTokens >= 4 ? 2
                                                       : 4)
                                     : 1;

template <int kWidth, bool kTable, int kTokens>
struct Sums {
  VI sum[kTokens][kChains<kTokens>];

  inline void start(const PanelLayout& layout, VI zero, const std::int32_t* at) {
    for (int t = 0; t < kTokens; ++t) {
      sum[t][0] = layout.zeros == Zeros::kBytes ? zero * at[t] : broadcast<VI>(at[t]);
      for (int c = 1; c < kChains<kTokens>; ++c) sum[t][c] = VI{};
    }
  }

  inline void add_strip(const PanelLayout& layout, const std::uint8_t* codes, std::int64_t strip,
                        int part, const std::int32_t* x) {
    VI quad[4];
    load_strip<kWidth>(codes, strip, part, quad);
    if constexpr (kTable)
      for (int j = 0; j < 4; ++j) quad[j] = look_up_bytes(layout.dot_levels, quad[j]);
    if constexpr (kVnni) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 16
        for (int t = 0; t < kTokens; ++t) {
          VI& chain = sum[t][j % kChains<kTokens>];
          chain = dot4(chain, quad[j], broadcast<VI>(x[j * kTokens + t]));
        }
      }
    } else {
      constexpr bool kSmall = kWidth != 8 && !kTable;
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t)
        sum[t][0] = dot_strip<kSmall>(sum[t][0], quad, x + t, kTokens);
    }
  }

  inline VF total(int t) const {
    VI all = sum[t][0];
    for (int c = 1; c < kChains<kTokens>; ++c) all += sum[t][c];
    return __builtin_convertvector(all, VF);
  }
};

template <int kWidth, bool kTable, int kTokens>
inline void tile_part(const PanelLayout& layout, const std::uint8_t* panel, const DotTokens& x,
                      int part, float* y, std::int64_t ldy) {
  const std::uint8_t* codes = panel + layout.codes_at;
  VF out[kTokens] = {};
  std::int64_t seen = 0;  // segments
  for (std::int64_t g = 0; g < layout.groups; ++g) {
    const std::int64_t first = g * layout.group_strips;
    const std::int64_t end =
        first + layout.group_strips < layout.strips ? first + layout.group_strips : layout.strips;
    const VF scale = load_scales(layout, panel, 0, g, part) * layout.unit;
    VI zero = {};
    VF offset = {};
    if (layout.zeros == Zeros::kBytes)
      zero = load_bytes(panel + layout.zeros_at + g * kPanelRows + part * kF32);
    if (layout.zeros == Zeros::kOffsets)
      offset = -load_scales(layout, panel, layout.zeros_at, g, part);
    for (std::int64_t begin = first; begin < end; begin += x.segment, ++seen) {
      const std::int64_t stop = begin + x.segment < end ? begin + x.segment : end;
      Sums<kWidth, kTable, kTokens> sums;
      sums.start(layout, zero, x.start + seen * kTokens);
      for (std::int64_t s = begin; s < stop; ++s) {
        prefetch_strip<kWidth>(codes + layout.bytes, s);
        sums.add_strip(layout, codes, s, part, x.quads + s * 4 * kTokens);
      }
      const float* token = x.scale + seen * kTokens;
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t)
        out[t] = fma(sums.total(t), x.per_token ? scale : scale * token[t], out[t]);
      if (layout.zeros == Zeros::kOffsets)
        for (int t = 0; t < kTokens; ++t)
          out[t] = fma(offset, broadcast<VF>(x.shift[seen * kTokens + t]), out[t]);
    }
  }
  for (int t = 0; t < kTokens; ++t)
    store(y + t * ldy + part * kF32, x.per_token ? out[t] * x.scale[t] : out[t]);
}

template <int kWidth, bool kTable, int kTokens>
inline void tile(const PanelLayout& layout, const std::uint8_t* panel, const DotTokens& x, float* y,
                 std::int64_t ldy) {
  if constexpr (kTokens > 0) {
    if (x.tokens < kTokens) return tile<kWidth, kTable, kTokens - 1>(layout, panel, x, y, ldy);
    for (int part = 0; part < kParts; ++part)
      tile_part<kWidth, kTable, kTokens>(layout, panel, x, part, y, ldy);
  }
}

// Largest |x| / 127, not finite where a value is not: as integers, NaN > infinity > all others.
inline float step_of(const float* x, std::int64_t columns) {
  VI most = {};
  for (std::int64_t i = 0; i < columns; i += kF32) {
    const VI size = load<VI>(x + i) & 0x7FFFFFFF;
    most = size > most ? size : most;
  }
  std::int32_t lanes[kF32];
  store(lanes, most);
  for (int half = kF32 / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i)
      lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  float largest;
  std::memcpy(&largest, lanes, sizeof largest);
  return largest / 127.0F;
}

}  // namespace

void dot_tile(const PanelLayout& layout, const std::uint8_t* panel, const DotTokens& x, float* y,
              std::int64_t ldy) {
  constexpr int kMost = kDotTokens;
  if (layout.table) return tile<4, true, kMost>(layout, panel, x, y, ldy);
  if (layout.width == 2) return tile<2, false, kMost>(layout, panel, x, y, ldy);
  if (layout.width == 3) return tile<3, false, kMost>(layout, panel, x, y, ldy);
  if (layout.width == 4) return tile<4, false, kMost>(layout, panel, x, y, ldy);
  tile<8, false, kMost>(layout, panel, x, y, ldy);
}

void quantize_row(const PanelLayout& layout, std::int64_t segment, bool per_token, const float* x,
                  int stride, std::int32_t* quads, float* scale, std::int32_t* sum) {
  constexpr float kSmallest = 1e-30F;  // below it 127 / step could overflow: all codes are 0
  using Bytes = std::int8_t __attribute__((vector_size(kF32)));
  const float whole = per_token ? step_of(x, layout.strips * kStrip) : 0.0F;
  if (per_token) *scale = whole;
  for (std::int64_t g = 0, first = 0; g < layout.groups; ++g, first += layout.group_strips) {
    const std::int64_t end =
        first + layout.group_strips < layout.strips ? first + layout.group_strips : layout.strips;
    for (std::int64_t begin = first; begin < end; begin += segment, sum += stride) {
      const std::int64_t stop = begin + segment < end ? begin + segment : end;
      const float step = per_token ? whole : step_of(x + begin * kStrip, (stop - begin) * kStrip);
      if (!per_token) {
        *scale = step;
        scale += stride;
      }
      const VF inverse = broadcast<VF>(step > kSmallest ? 1.0F / step : 0.0F);
      VI total = {};
      for (std::int64_t s = begin; s < stop; ++s) {
        alignas(16) std::int32_t words[4];
        for (int i = 0; i < kStrip; i += kF32) {
          const VI q = __builtin_convertvector(rint(load<VF>(x + s * kStrip + i) * inverse), VI);
          total += q;
          store(reinterpret_cast<std::int8_t*>(words) + i, __builtin_convertvector(q, Bytes));
        }
        for (int j = 0; j < 4; ++j) quads[(s * 4 + j) * stride] = words[j];
      }
      std::int32_t lanes[kF32];
      store(lanes, total);
      for (int half = kF32 / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
      *sum = lanes[0];
    }
  }
}

}  // namespace bitwright::BITWRIGHT_ISA_NAME
