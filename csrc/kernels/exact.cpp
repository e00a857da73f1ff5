// Panels as floats: w = (code - zero) scale, of tables level * scale, with offsets code * scale -
// offset, rounded as `decode` does. Few tokens are multiplied at once, weights staying in
// registers, one multiply-add chain along k per output; for many the weights are written out for
// the tiles.
#include "kernels/panels.h"
#include "kernels/table.h"

namespace bitwright::BITWRIGHT_ISA_NAME {

namespace {

// Without vector look-ups unrolled loops would only be long.
inline constexpr int kUnroll = kBytes >= 32 ? kStrip : 1;

enum class Kind : int { kLevels, kZeros };

// Where 16 floats are one register, integers around one zero point are a table as well.
inline Kind kind_of(const PanelLayout& layout) {
  const bool around = layout.zeros == Zeros::kMiddle && layout.width <= 4 && kBytes == 64;
  return layout.table || around ? Kind::kLevels : Kind::kZeros;
}

struct Levels16 {
  alignas(64) float values[16];
  explicit Levels16(const PanelLayout& layout) {
    for (int c = 0; c < 16; ++c)
      values[c] = layout.table ? layout.levels[c] : static_cast<float>(c) - layout.middle;
  }
};

// One group of one vector of rows; one of zero and offset is 0, and takes nothing away.
struct Group {
  VF scale, zero, offset;
};

inline Group load_group(const PanelLayout& layout, const std::uint8_t* panel, std::int64_t g,
                        int part) {
  const VF scale = load_scales(layout, panel, 0, g, part),
           zero = load_zeros(layout, panel, g, part);
  if (layout.zeros == Zeros::kOffsets) return {scale, VF{}, zero};
  return {scale, zero, VF{}};
}

template <Kind kKind>
inline VF value(VI quad, int t, const Group& group, const Levels16& levels) {
  const VI code = quad >> (8 * t);
  if constexpr (kKind == Kind::kLevels) return look_up(levels.values, code) * group.scale;
  const VF number = __builtin_convertvector(code & 255, VF);
  return (number - group.zero) * group.scale - group.offset;
}

template <int kWidth, Kind kKind, int kPanels, int kTokens>
inline void rows(const PanelLayout& layout, const std::uint8_t* panels, const float* x,
                 std::int64_t ldx, float* y, std::int64_t ldy) {
  const Levels16 levels(layout);
  VF out[kTokens][kPanels][kParts] = {};
  for (std::int64_t g = 0; g < layout.groups; ++g) {
    const std::int64_t first = g * layout.group_strips;
    const std::int64_t end =
        first + layout.group_strips < layout.strips ? first + layout.group_strips : layout.strips;
    Group group[kPanels][kParts];
    for (int p = 0; p < kPanels; ++p)
      for (int v = 0; v < kParts; ++v)
        group[p][v] = load_group(layout, panels + p * layout.bytes, g, v);
    for (std::int64_t s = first; s < end; ++s) {
      VI quad[kPanels][kParts][4];
      for (int p = 0; p < kPanels; ++p)
        prefetch_strip<kWidth>(panels + (p + kPanels) * layout.bytes + layout.codes_at, s);
      for (int p = 0; p < kPanels; ++p)
        for (int v = 0; v < kParts; ++v)
          load_strip<kWidth>(panels + p * layout.bytes + layout.codes_at, s, v, quad[p][v]);
#pragma GCC unroll kUnroll
      for (int i = 0; i < kStrip; ++i) {
        for (int p = 0; p < kPanels; ++p)
          for (int v = 0; v < kParts; ++v) {
            const VF w = value<kKind>(quad[p][v][i / 4], i % 4, group[p][v], levels);
            for (int t = 0; t < kTokens; ++t)
              out[t][p][v] = fma(broadcast<VF>(x[t * ldx + s * kStrip + i]), w, out[t][p][v]);
          }
      }
    }
  }
  for (int t = 0; t < kTokens; ++t)
    for (int p = 0; p < kPanels; ++p)
      for (int v = 0; v < kParts; ++v) store(y + t * ldy + p * kPanelRows + v * kF32, out[t][p][v]);
}

// Enough chains side by side to hide a multiply-add's latency.
template <int kTokens>
inline constexpr int kAbreast = kParts > 2 ? 1 : 4 / kTokens / kParts;

template <int kWidth, Kind kKind, int kTokens>
inline void all_rows(const PanelLayout& layout, const std::uint8_t* panels, std::int64_t count,
                     const float* x, std::int64_t ldx, float* y, std::int64_t ldy) {
  constexpr int kPanels = kAbreast<kTokens>;
  std::int64_t p = 0;
  for (; p + kPanels <= count; p += kPanels)
    rows<kWidth, kKind, kPanels, kTokens>(layout, panels + p * layout.bytes, x, ldx,
                                          y + p * kPanelRows, ldy);
  for (; p < count; ++p)
    rows<kWidth, kKind, 1, kTokens>(layout, panels + p * layout.bytes, x, ldx, y + p * kPanelRows,
                                    ldy);
}

template <int kWidth, Kind kKind>
struct MultiplyRows {
  static void run(const PanelLayout& layout, const std::uint8_t* panels, std::int64_t count,
                  int tokens, const float* x, std::int64_t ldx, float* y, std::int64_t ldy) {
    for (; tokens >= 2; tokens -= 2, x += 2 * ldx, y += 2 * ldy)
      all_rows<kWidth, kKind, 2>(layout, panels, count, x, ldx, y, ldy);
    if (tokens == 1) all_rows<kWidth, kKind, 1>(layout, panels, count, x, ldx, y, ldy);
  }
};

// Columns of the strips [begin, end), each a row of `out`; see kernels.def.
template <int kWidth, Kind kKind>
struct Dequantize {
  static void run(const PanelLayout& layout, const std::uint8_t* panel, std::int64_t begin,
                  std::int64_t end, int panel_number, std::int64_t depth, float* out) {
    const Levels16 levels(layout);
    for (int v = 0; v < kParts; ++v) {
      const int vector = panel_number * kParts + v;
      float* to = out + vector / kVectors * depth * kNrF32 + vector % kVectors * kF32;
      for (std::int64_t s = begin; s < end; ++s) {
        const std::int64_t g = s / layout.group_strips;
        const std::int64_t first = (s - g * layout.group_strips) * kStrip;
        std::int64_t columns = layout.k - g * layout.group;
        columns = (columns < layout.group ? columns : layout.group) - first;
        const Group group = load_group(layout, panel, g, v);
        VI quad[4];
        load_strip<kWidth>(panel + layout.codes_at, s, v, quad);
#pragma GCC unroll kUnroll
        for (int i = 0; i < kStrip; ++i) {
          if (i < columns) {
            store(to, value<kKind>(quad[i / 4], i % 4, group, levels));
            to += kNrF32;
          }
        }
      }
    }
  }
};

template <template <int, Kind> class Kernel, Kind kKind, class... Arguments>
inline void by_width(const PanelLayout& layout, Arguments... arguments) {
  if (layout.width == 2) return Kernel<2, kKind>::run(layout, arguments...);
  if (layout.width == 3) return Kernel<3, kKind>::run(layout, arguments...);
  if (layout.width == 4) return Kernel<4, kKind>::run(layout, arguments...);
  if constexpr (kKind != Kind::kLevels) Kernel<8, kKind>::run(layout, arguments...);
}

template <template <int, Kind> class Kernel, class... Arguments>
inline void by_layout(const PanelLayout& layout, Arguments... arguments) {
  if (kind_of(layout) == Kind::kLevels)
    return by_width<Kernel, Kind::kLevels>(layout, arguments...);
  by_width<Kernel, Kind::kZeros>(layout, arguments...);
}

}  // namespace

void multiply_rows(const PanelLayout& layout, const std::uint8_t* panels, std::int64_t count,
                   int tokens, const float* x, std::int64_t ldx, float* y, std::int64_t ldy) {
  by_layout<MultiplyRows>(layout, panels, count, tokens, x, ldx, y, ldy);
}

void dequantize(const PanelLayout& layout, const std::uint8_t* panel, std::int64_t begin,
                std::int64_t end, int panel_number, std::int64_t depth, float* out) {
  by_layout<Dequantize>(layout, panel, begin, end, panel_number, depth, out);
}

void widen_bf16(std::int64_t count, const std::uint16_t* words, float* values) {
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint32_t bits = static_cast<std::uint32_t>(words[i]) << 16;
    std::memcpy(values + i, &bits, sizeof bits);
  }
}

// Ties to even; NaN stays NaN.
void narrow_bf16(std::int64_t count, const float* values, std::uint16_t* words) {
  for (std::int64_t i = 0; i < count; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    const bool nan = (bits & 0x7FFFFFFFU) > 0x7F800000U;
    const std::uint32_t rounded = bits + 0x7FFFU + (bits >> 16 & 1U);
    words[i] = static_cast<std::uint16_t>((nan ? bits | 0x400000U : rounded) >> 16);
  }
}

}  // namespace bitwright::BITWRIGHT_ISA_NAME
