// Codes of 16 rows as the strips of a panel (kernels/packed.h), from bytes or from packed words,
// and back.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "core/view.h"
#include "kernels/packed.h"
#include "ops/bitstream.h"

namespace bitwright {

inline constexpr Index kLine = 64;

// The words of a row's strip: four quads of a lane to and from the units they share.
template <int kWidth>
struct Units {
  std::uint8_t* at[4];
  int shift[4];
  std::uint8_t* high;  // width 3
  int high_shift;

  Units(const PanelLayout& layout, std::uint8_t* panel, Index strip, Index lane) {
    std::uint8_t* codes = panel + layout.codes_at + lane * 4;
    constexpr int kLow = kWidth == 3 ? 2 : kWidth, kPerUnit = 8 / kLow;
    std::uint8_t* first = codes + strip * kLow / 2 * kLine;
    if (kWidth == 3) first = codes + (strip / 2 * 3 + strip % 2) * kLine;
    high = codes + (strip / 2 * 3 + 2) * kLine;
    high_shift = static_cast<int>(strip % 2 * 4);
    for (int j = 0; j < 4; ++j) {
      at[j] = first + j / kPerUnit * kLine;
      shift[j] = j % kPerUnit * kLow;
    }
  }
};

inline std::uint32_t word_at(const std::uint8_t* at, int shift, std::uint32_t mask) {
  std::uint32_t word;
  std::memcpy(&word, at, 4);
  return word >> shift & mask;
}

// Writes the lane's words of a strip. Width 3: the unit that strips share is 0 before its first.
template <int kWidth>
void put_strip(const PanelLayout& layout, std::uint8_t* panel, Index strip, Index lane,
               const std::uint8_t* codes) {
  const Units<kWidth> units(layout, panel, strip, lane);
  std::uint32_t quad[4], word = 0;
  std::memcpy(quad, codes, sizeof quad);
  if constexpr (kWidth == 3) {
    std::uint32_t high = 0;
    if (strip % 2 != 0) std::memcpy(&high, units.high, 4);
    for (int j = 0; j < 4; ++j) {
      high |= (quad[j] >> 2 & 0x01010101U) << (units.high_shift + j);
      quad[j] &= 0x03030303U;
    }
    std::memcpy(units.high, &high, 4);
  }
  for (int j = 0; j < 4; ++j) {
    word |= quad[j] << units.shift[j];
    if (j == 3 || (j + 1) % (8 / (kWidth == 3 ? 2 : kWidth)) == 0) {
      std::memcpy(units.at[j], &word, 4);
      word = 0;
    }
  }
}

template <int kWidth>
void get_strip(const PanelLayout& layout, std::uint8_t* panel, Index strip, Index lane,
               std::uint8_t* codes) {
  const Units<kWidth> units(layout, panel, strip, lane);
  constexpr std::uint32_t mask = (0xFFU >> (8 - (kWidth == 3 ? 2 : kWidth))) * 0x01010101U;
  for (int j = 0; j < 4; ++j) {
    std::uint32_t quad = word_at(units.at[j], units.shift[j], mask);
    if constexpr (kWidth == 3) quad |= word_at(units.high, units.high_shift + j, 0x01010101U) << 2;
    std::memcpy(codes + 4 * j, &quad, 4);
  }
}

// f(width) of the layout's, as a constant.
template <class F>
void with_width(const PanelLayout& layout, const F& f) {
  if (layout.width == 2) return f(std::integral_constant<int, 2>{});
  if (layout.width == 3) return f(std::integral_constant<int, 3>{});
  if (layout.width == 4) return f(std::integral_constant<int, 4>{});
  f(std::integral_constant<int, 8>{});
}

struct Strips {
  Index begin, end;
};

inline Index first_column(const PanelLayout& layout, Index strip) {
  const Index g = strip / layout.group_strips;
  return std::min(layout.k, g * layout.group + (strip - g * layout.group_strips) * kStrip);
}

// f(strip, first column, columns) over strips of a row, which follow each other without a gap.
template <class F>
void each_strip(const PanelLayout& layout, Strips strips, const F& f) {
  Index column = first_column(layout, strips.begin);
  for (Index s = strips.begin; s < strips.end; ++s) {
    const Index next = s + 1 == layout.strips ? layout.k : first_column(layout, s + 1);
    f(s, column, next - column);
    column = next;
  }
}

// Strips of a panel, 0 before, from its rows' codes, of which codes[0] is that of column `start`.
template <int kWidth>
void put_strips(const PanelLayout& layout, const std::uint8_t* codes, Index stride, Index start,
                Strips strips, Index lanes, std::uint8_t* panel) {
  each_strip(layout, strips, [&](Index strip, Index column, Index columns) {
    const std::uint8_t* from = codes + column - start;
    for (Index lane = 0; lane < lanes; ++lane, from += stride) {
      std::uint8_t padded[kStrip] = {};
      if (columns < kStrip) std::memcpy(padded, from, static_cast<std::size_t>(columns));
      put_strip<kWidth>(layout, panel, strip, lane, columns < kStrip ? padded : from);
    }
  });
}

// Strips from the first on that are whole words of a row's packed codes.
inline Index turned_strips(const PanelLayout& layout) {
  if (layout.groups > 1 && layout.group % kStrip != 0) return 0;
  return layout.width == 3 ? layout.k / (2 * kStrip) * 2 : layout.k / kStrip;
}

// What two codes of 3 bits, a column's and the next one's in quad j, are in the units of a strip:
// their low bits in the lower half, the third ones in the upper.
struct PairsOfThree {
  std::uint64_t of[4][64] = {};
  constexpr PairsOfThree() {
    for (int j = 0; j < 4; ++j)
      for (std::uint64_t codes = 0; codes < 64; ++codes) {
        const std::uint64_t low = (codes & 3U) | (codes >> 3 & 3U) << 8;
        const std::uint64_t high = (codes >> 2 & 1U) | (codes >> 5 & 1U) << 8;
        of[j][codes] = low << 2 * j | high << (32 + j);
      }
  }
};
inline constexpr PairsOfThree kPairsOfThree;

inline std::uint64_t strip_of_three(std::uint64_t codes) {
  std::uint64_t units = 0;
  for (int j = 0; j < 4; ++j, codes >>= 12)
    units |= kPairsOfThree.of[j][codes & 63U] | kPairsOfThree.of[j][codes >> 6 & 63U] << 16;
  return units;
}

// Words of packed codes, whole strips or pairs of them, as a row's words of units: byte t takes the
// codes of column t of quads. Cells that change places are swapped, pair by pair.
template <int kWidth>
void turn(const std::uint32_t* words, Index count, std::uint32_t* units) {
  if constexpr (kWidth == 3) {
    for (Index i = 0; i < count; i += 3) {
      const std::uint64_t low = words[i] | static_cast<std::uint64_t>(words[i + 1]) << 32;
      const std::uint64_t high = low >> 48 | static_cast<std::uint64_t>(words[i + 2]) << 16;
      const std::uint64_t first = strip_of_three(low), second = strip_of_three(high);
      units[i] = static_cast<std::uint32_t>(first);
      units[i + 1] = static_cast<std::uint32_t>(second);
      units[i + 2] = static_cast<std::uint32_t>(first >> 32 | second >> 32 << 4);
    }
    return;
  }
  for (Index i = 0; i < count; ++i) {
    std::uint32_t word = words[i];
    const auto swap = [&](int shift, std::uint32_t mask) {
      const std::uint32_t both = (word ^ word >> shift) & mask;
      word ^= both ^ both << shift;
    };
    if (kWidth == 2) {  // 4 x 4 codes, transposed
      swap(6, 0x00CC00CCU);
      swap(12, 0x0000F0F0U);
    } else if (kWidth == 4) {  // two quads, shuffled
      swap(8, 0x0000FF00U);
      swap(4, 0x00F000F0U);
    }
    units[i] = word;
  }
}

// The first strips of a panel from rows of packed codes, word by word.
template <int kWidth>
void put_turned(const PanelLayout& layout, const std::uint32_t* words, Index stride, Index strips,
                Index lanes, std::uint8_t* panel) {
  constexpr Index kTile = kWidth == 3 ? 24 : 16;
  std::uint32_t tile[kPanelRows][kTile] = {};
  const Index count = strips * kWidth / 2;
  for (Index first = 0; first < count; first += kTile) {
    const Index some = std::min(kTile, count - first);
    for (Index lane = 0; lane < lanes; ++lane)
      turn<kWidth>(words + lane * stride + first, some, tile[lane]);
    std::uint8_t* unit = panel + layout.codes_at + first * kLine;
    for (Index i = 0; i < some; ++i)
      for (Index lane = 0; lane < kPanelRows; ++lane, unit += 4)
        std::memcpy(unit, &tile[lane][i], 4);
  }
}

// The strips of a panel from `begin` on, 0 before, the codes of a few unpacked at a time.
template <int kWidth>
void put_unpacked(const PanelLayout& layout, const std::uint32_t* words, Index stride, int bits,
                  Index begin, Index lanes, std::uint8_t* panel) {
  constexpr Index kStrips = 16, kAligned = 32, kColumns = kStrips * kStrip + kAligned;
  std::uint8_t codes[kPanelRows][kColumns];
  for (Index strip = begin; strip < layout.strips; strip += kStrips) {
    const Strips some = {strip, std::min(layout.strips, strip + kStrips)};
    const Index start = first_column(layout, some.begin) / kAligned * kAligned;
    const Index end = some.end == layout.strips ? layout.k : first_column(layout, some.end);
    for (Index lane = 0; lane < lanes; ++lane)
      read_bits(words + lane * stride + start / 32 * bits, end - start, bits, codes[lane]);
    put_strips<kWidth>(layout, codes[0], kColumns, start, some, lanes, panel);
  }
}

}  // namespace bitwright
