// Panels times int8 tokens, 16 rows x up to kDotTokens tokens: integer sums over a segment in
// registers; of a group, from what its zero points take away on, sum = fma(segment, token scale,
// sum), or sum + segment where tokens have one scale each; y = fma(sum, weight scale, y). All
// ascending.
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
  VI sum[kTokens][kChains<kTokens>] = {};

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

// What a group's sums start with: x.shift times the zero points, if they count in codes.
template <int kTokens>
inline void start(const PanelLayout& layout, const std::uint8_t* panel, std::int64_t g, int part,
                  const float* shift, VF (&sum)[kTokens]) {
  if (layout.zeros == Zeros::kMiddle) {
    for (int t = 0; t < kTokens; ++t) sum[t] = broadcast<VF>(shift[t]);
  } else if (layout.zeros == Zeros::kBytes) {
    const VF zero = load_zeros(layout, panel, g, part);
    for (int t = 0; t < kTokens; ++t) sum[t] = zero * shift[t];
  } else {
    for (int t = 0; t < kTokens; ++t) sum[t] = VF{};
  }
}

template <int kWidth, bool kTable, int kTokens>
inline void tile_part(const PanelLayout& layout, const std::uint8_t* panel, const DotTokens& x,
                      int part, float* y, std::int64_t ldy) {
  const std::uint8_t* codes = panel + layout.codes_at;
  const float *token = x.scale, *shift = x.shift;
  VF out[kTokens] = {};
  for (std::int64_t g = 0; g < layout.groups; ++g, shift += kTokens) {
    const std::int64_t first = g * layout.group_strips;
    const std::int64_t end =
        first + layout.group_strips < layout.strips ? first + layout.group_strips : layout.strips;
    VF sum[kTokens];
    start(layout, panel, g, part, shift, sum);
    for (std::int64_t begin = first; begin < end; begin += x.segment) {
      const std::int64_t stop = begin + x.segment < end ? begin + x.segment : end;
      Sums<kWidth, kTable, kTokens> segment;
      for (std::int64_t s = begin; s < stop; ++s) {
        prefetch_strip<kWidth>(codes + layout.bytes, s);
        segment.add_strip(layout, codes, s, part, x.quads + s * 4 * kTokens);
      }
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t)
        sum[t] = x.per_token ? sum[t] + segment.total(t)
                             : fma(segment.total(t), broadcast<VF>(token[t]), sum[t]);
      if (!x.per_token) token += kTokens;
    }
    const VF scale = load_scales(layout, panel, 0, g, part) * layout.unit;
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) out[t] = fma(sum[t], scale, out[t]);
    if (layout.zeros == Zeros::kOffsets) {
      const VF offset = load_scales(layout, panel, layout.zeros_at, g, part);
      for (int t = 0; t < kTokens; ++t) out[t] = fma(offset, broadcast<VF>(shift[t]), out[t]);
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
