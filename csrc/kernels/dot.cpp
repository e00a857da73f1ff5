// Panels times int8 tokens, 16 rows x up to kDotTokens tokens: integer sums over a segment in
// registers; of a group, from what its zero points take away on, sum = fma(segment, token scale,
// sum), or sum + segment where tokens have one scale each; y = fma(sum, weight scale, y). All
// ascending, a segment's second digit behind its first. By token the integer sums come out of
// tiles: a segment's codes as bytes are the right operand, 64 columns at most, and what follows is
// the same.
#include "kernels/amx.h"
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

// What a group's sums are worth. Inline, or they would go through memory: 6 % of a product.
template <int kTokens>
__attribute__((always_inline)) inline void finish(const PanelLayout& layout,
                                                  const std::uint8_t* panel, std::int64_t g,
                                                  int part, const float* shift,
                                                  const VF (&sum)[kTokens], VF (&out)[kTokens]) {
  const VF scale = load_scales(layout, panel, 0, g, part) * layout.unit;
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) out[t] = fma(sum[t], scale, out[t]);
  if (layout.zeros == Zeros::kOffsets) {
    const VF offset = load_scales(layout, panel, layout.zeros_at, g, part);
    for (int t = 0; t < kTokens; ++t) out[t] = fma(offset, broadcast<VF>(shift[t]), out[t]);
  }
}

template <int kWidth, bool kTable, int kTokens>
inline void tile_part(const PanelLayout& layout, const std::uint8_t* panel, const DotTokens& x,
                      int part, float* y, std::int64_t ldy) {
  const std::uint8_t* codes = panel + layout.codes_at;
  const float *token = x.scale, *shift = x.shift;
  std::int64_t number = 0, finer = 0;
  VF out[kTokens] = {};
  for (std::int64_t g = 0; g < layout.groups; ++g, shift += kTokens) {
    const std::int64_t first = g * layout.group_strips;
    const std::int64_t end =
        first + layout.group_strips < layout.strips ? first + layout.group_strips : layout.strips;
    VF sum[kTokens];
    if (part == 0) prefetch_group(layout, panel + layout.bytes, g);
    start(layout, panel, g, part, shift, sum);
    for (std::int64_t begin = first; begin < end; begin += x.segment, ++number) {
      const std::int64_t stop = begin + x.segment < end ? begin + x.segment : end;
      const std::int32_t* quads = x.quads + begin * 4 * kTokens;
      const float* scale = token;
      for (;;) {
        Sums<kWidth, kTable, kTokens> segment;
        for (std::int64_t s = begin; s < stop; ++s, quads += 4 * kTokens) {
          prefetch_strip<kWidth>(codes + layout.bytes, s);
          segment.add_strip(layout, codes, s, part, quads);
        }
#pragma GCC unroll 16
        for (int t = 0; t < kTokens; ++t)
          sum[t] = x.per_token ? sum[t] + segment.total(t)
                               : fma(segment.total(t), broadcast<VF>(scale[t]), sum[t]);
        if (finer == x.finer_count || x.finer[finer] != number) break;
        quads = x.finer_quads + finer * x.segment * 4 * kTokens;
        scale = x.finer_scale + finer++ * kTokens;
      }
      if (!x.per_token) token += kTokens;
    }
    finish(layout, panel, g, part, shift, sum, out);
  }
  for (int t = 0; t < kTokens; ++t)
    store(y + t * ldy + part * kF32, x.per_token ? out[t] * x.scale[t] : out[t]);
}

template <int kWidth, bool kTable, int kTokens = kDotTokens>
inline void tile(const PanelLayout& layout, const std::uint8_t* panel, const DotTokens& x, float* y,
                 std::int64_t ldy) {
  if constexpr (kTokens > 0) {
    if (x.tokens < kTokens) return tile<kWidth, kTable, kTokens - 1>(layout, panel, x, y, ldy);
    for (int part = 0; part < kParts; ++part)
      tile_part<kWidth, kTable, kTokens>(layout, panel, x, part, y, ldy);
  }
}

#if defined(BITWRIGHT_AMX)
// The codes of strips begin .. stop - 1 as quads, followed by zeros up to `strips`.
template <int kWidth, bool kTable>
inline void unpack(const PanelLayout& layout, const std::uint8_t* codes, std::int64_t begin,
                   std::int64_t stop, std::int64_t strips, std::uint8_t* to) {
  for (std::int64_t s = begin; s < begin + strips; ++s, to += 4 * kTileBytes) {
    VI quad[4] = {};
    if (s < stop) {
      prefetch_strip<kWidth>(codes + layout.bytes, s);
      load_strip<kWidth>(codes, s, 0, quad);
      if constexpr (kTable)
        for (int j = 0; j < 4; ++j) quad[j] = look_up_bytes(layout.dot_levels, quad[j]);
    }
    for (int j = 0; j < 4; ++j) store(to + j * kTileBytes, quad[j]);
  }
}

template <int kWidth, bool kTable>
inline void tile_by_token(const PanelLayout& layout, const std::uint8_t* panel, const DotTokens& x,
                          float* y, std::int64_t ldy) {
  constexpr int kMostStrips = 4;
  const int strips = x.segment < kMostStrips ? static_cast<int>(x.segment) : kMostStrips;
  TileShapes shapes;
  shapes.set(0, x.tokens, kTileBytes);
  shapes.set(1, x.tokens, strips * kStrip);
  shapes.set(2, strips * 4, kTileBytes);
  const TileScope scope(shapes);
  const std::uint8_t* codes = panel + layout.codes_at;
  const float *token = x.scale, *shift = x.shift;
  alignas(64) std::uint8_t bytes[kMostStrips * 4 * kTileBytes];
  alignas(64) std::int32_t products[kTokensByToken][kF32] = {};
  float shifts[kTokensByToken] = {}, scales[kTokensByToken] = {};
  std::int64_t number = 0, finer = 0;
  VF out[kTokensByToken] = {}, sum[kTokensByToken];
  for (std::int64_t g = 0; g < layout.groups; ++g, shift += x.tokens) {
    const std::int64_t first = g * layout.group_strips;
    const std::int64_t end =
        first + layout.group_strips < layout.strips ? first + layout.group_strips : layout.strips;
    prefetch_group(layout, panel + layout.bytes, g);
    for (int t = 0; t < x.tokens; ++t) shifts[t] = shift[t];
    start(layout, panel, g, 0, shifts, sum);
    for (std::int64_t begin = first; begin < end; begin += x.segment, ++number) {
      const std::int64_t stop = begin + x.segment < end ? begin + x.segment : end;
      const std::uint8_t* tokens = reinterpret_cast<const std::uint8_t*>(x.quads) + begin * kStrip;
      const float* scale = token;
      std::int64_t row = layout.strips * kStrip;
      for (;;) {
        TILE_ZERO(0);
        for (std::int64_t s = begin; s < stop; s += strips, tokens += strips * kStrip) {
          unpack<kWidth, kTable>(layout, codes, s, stop, strips, bytes);
          TILE_LOAD(1, tokens, row);
          TILE_LOAD(2, bytes, kTileBytes);
          TILE_BYTES(0, 1, 2);
        }
        TILE_STORE(0, products, kTileBytes);
        for (int t = 0; t < x.tokens; ++t) scales[t] = x.per_token ? 1.0F : scale[t];
#pragma GCC unroll 16
        for (int t = 0; t < kTokensByToken; ++t) {
          const VF segment = __builtin_convertvector(load<VI>(products[t]), VF);
          sum[t] = x.per_token ? sum[t] + segment : fma(segment, broadcast<VF>(scales[t]), sum[t]);
        }
        if (finer == x.finer_count || x.finer[finer] != number) break;
        row = x.segment * kStrip;
        tokens = reinterpret_cast<const std::uint8_t*>(x.finer_quads) + finer * x.tokens * row;
        scale = x.finer_scale + finer++ * x.tokens;
      }
      if (!x.per_token) token += x.tokens;
    }
    finish(layout, panel, g, 0, shifts, sum, out);
  }
  for (int t = 0; t < x.tokens; ++t) store(y + t * ldy, x.per_token ? out[t] * x.scale[t] : out[t]);
}
#endif

// f of all lanes, half by half.
template <class F>
inline std::int32_t across(VI all, const F& f) {
  using Four = std::int32_t __attribute__((vector_size(16)));
  Four four[kBytes / 16];
  std::memcpy(four, &all, sizeof all);
#pragma GCC unroll 2
  for (int half = kBytes / 32; half > 0; half /= 2)
#pragma GCC unroll 2
    for (int i = 0; i < half; ++i) four[i] = f(four[i], four[i + half]);
  return f(f(four[0][0], four[0][2]), f(four[0][1], four[0][3]));
}

inline std::int32_t largest_of(VI all) {
  return across(all, [](auto a, auto b) { return a > b ? a : b; });
}

inline std::int32_t total_of(VI all) {
  return across(all, [](auto a, auto b) { return a + b; });
}

// Largest |x| / 127, not finite where a value is not: as integers, NaN > infinity > all others.
inline float step_of(const float* x, std::int64_t columns) {
  VI most = {};
  for (std::int64_t i = 0; i < columns; i += kF32) {
    const VI size = load<VI>(x + i) & 0x7FFFFFFF;
    most = size > most ? size : most;
  }
  const std::int32_t bits = largest_of(most);
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  return largest / 127.0F;
}

// Below it 127 / step could overflow: all codes are 0.
inline float inverse_of(float step) { return step > 1e-30F ? 1.0F / step : 0.0F; }

// A strip's bytes as quads `apart` words apart, and their sums by lane; code(i) are columns i on.
template <class Code>
inline VI keep_strip(std::int32_t* quads, int apart, const Code& code) {
  using Bytes = std::int8_t __attribute__((vector_size(kF32)));
  alignas(16) std::int32_t words[4];
  VI sum = {};
  for (int i = 0; i < kStrip; i += kF32) {
    const VI q = __builtin_convertvector(code(i), VI);
    sum += q;
    store(reinterpret_cast<std::int8_t*>(words) + i, __builtin_convertvector(q, Bytes));
  }
  for (int j = 0; j < 4; ++j) quads[j * apart] = words[j];
  return sum;
}

template <int kWidth, bool kTable>
inline void multiply(const PanelLayout& layout, const std::uint8_t* panel, const DotTokens& x,
                     float* y, std::int64_t ldy) {
#if defined(BITWRIGHT_AMX)
  if (x.by_token) return tile_by_token<kWidth, kTable>(layout, panel, x, y, ldy);
#endif
  tile<kWidth, kTable>(layout, panel, x, y, ldy);
}

}  // namespace

void dot_tile(const PanelLayout& layout, const std::uint8_t* panel, const DotTokens& x, float* y,
              std::int64_t ldy) {
  if (layout.table) return multiply<4, true>(layout, panel, x, y, ldy);
  if (layout.width == 2) return multiply<2, false>(layout, panel, x, y, ldy);
  if (layout.width == 3) return multiply<3, false>(layout, panel, x, y, ldy);
  if (layout.width == 4) return multiply<4, false>(layout, panel, x, y, ldy);
  multiply<8, false>(layout, panel, x, y, ldy);
}

void second_digit(std::int64_t strips, const float* x, float step, int apart, std::int32_t* quads,
                  std::int32_t* sum) {
  const VF inverse = broadcast<VF>(inverse_of(step)), back = broadcast<VF>(-step);
  const VF finer = broadcast<VF>(inverse_of(step / 254.0F));
  VI total = {};
  for (std::int64_t s = 0; s < strips; ++s)
    total += keep_strip(quads + s * 4 * apart, apart, [&](int i) {
      const VF value = load<VF>(x + s * kStrip + i);
      return rint(fma(rint(value * inverse), back, value) * finer);
    });
  *sum = total_of(total);
}

void quantize_row(const PanelLayout& layout, std::int64_t segment, bool per_token, const float* x,
                  int apart, int stride, std::int32_t* quads, float* scale, std::int32_t* sum) {
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
      const VF inverse = broadcast<VF>(inverse_of(step));
      VI total = {};
      for (std::int64_t s = begin; s < stop; ++s)
        total += keep_strip(quads + s * 4 * apart, apart,
                            [&](int i) { return rint(load<VF>(x + s * kStrip + i) * inverse); });
      *sum = total_of(total);
    }
  }
}

}  // namespace bitwright::BITWRIGHT_ISA_NAME
