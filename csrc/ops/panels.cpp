// Codes, scales and zero points into panels of 16 rows and back (kernels/packed.h). Rows are
// independent by panels, so that a loader packs a few at a time.
#include <cmath>

#include "core/half.h"
#include "ops.h"
#include "ops/panel.h"
#include "ops/strips.h"

namespace bitwright {

namespace {

Index lines(Index bytes) { return ceil_div(bytes, kLine) * kLine; }

Index word_bytes(const PanelLayout& layout) { return layout.scale == ScaleWords::kFloat32 ? 4 : 2; }

Index code_bytes(const PanelLayout& layout) {
  if (layout.width == 3) return ceil_div(layout.strips, 2) * 3 * kLine;
  return layout.strips * layout.width / 2 * kLine;
}

// Levels as bytes: multiples of the smallest positive one where they are, else of max / 127.
void set_levels(const std::vector<float>& levels, PanelLayout& layout) {
  require(levels.size() <= 16, "[pack_linear] a table must have at most 16 levels, got ",
          levels.size());
  float least = 0.0F, most = 0.0F;
  for (const float level : levels) {
    if (level > 0.0F && least == 0.0F) least = level;
    most = std::max(most, std::abs(level));
  }
  bool whole = least > 0.0F && most <= 127.0F * least;
  for (const float level : levels) whole = whole && level == least * std::rint(level / least);
  layout.unit = whole ? least : most / 127.0F;
  layout.dot_zero = static_cast<int>(-std::rint(levels.front() / layout.unit));
  for (std::size_t c = 0; c < levels.size(); ++c) {
    layout.levels[c] = levels[c];
    const int steps = static_cast<int>(std::rint(levels[c] / layout.unit));
    layout.dot_levels[c] = static_cast<std::uint8_t>(steps + layout.dot_zero);
  }
}

float read_word(const PanelLayout& layout, const std::uint8_t* from) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, from, static_cast<std::size_t>(word_bytes(layout)));
  if (layout.scale == ScaleWords::kFloat32) return as_float(bits);
  const std::uint16_t word = static_cast<std::uint16_t>(bits);
  return layout.scale == ScaleWords::kBf16 ? from_bf16(word) : from_fp16(word);
}

// A value as a word; whether the word is the value, and finite.
template <ScaleWords kWords>
bool write_word(float value, std::uint8_t* to) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const bool finite = (bits & 0x7F800000U) != 0x7F800000U;
  if constexpr (kWords == ScaleWords::kFloat32) {
    std::memcpy(to, &bits, 4);
    return finite;
  } else if constexpr (kWords == ScaleWords::kBf16) {
    const std::uint16_t word = static_cast<std::uint16_t>(bits >> 16);
    std::memcpy(to, &word, 2);
    return finite & ((bits & 0xFFFFU) == 0);
  } else {
    const float small = std::abs(value) * 0x1p-112F;
    std::memcpy(&bits, &small, 4);
    const std::uint16_t word =
        static_cast<std::uint16_t>((bits >> 13) | (std::signbit(value) ? 0x8000U : 0U));
    std::memcpy(to, &word, 2);
    return finite & (from_fp16(word) == value);
  }
}

// Scales or offsets of row `row` as every 16th word; what: what they are, for the sentence.
template <ScaleWords kWords>
void put_words(const char* what, In<float> values, Index row, std::uint8_t* to) {
  constexpr Index kBytes = kWords == ScaleWords::kFloat32 ? 4 : 2;
  constexpr const char* kNames[] = {"finite", "bf16 numbers", "fp16 numbers"};
  const float* from = values.data() + row * values.outerStride();
  bool good = true;
  for (Index g = 0; g < values.cols(); ++g)
    good &= write_word<kWords>(from[g], to + g * kPanelRows * kBytes);
  for (Index g = 0; !good && g < values.cols(); ++g)
    require(write_word<kWords>(from[g], to), "[pack_linear] ", what, " must be ",
            kNames[static_cast<int>(kWords)], ", got ", from[g], " at (", row, ", ", g, ")");
}

void put_words(const char* what, const PanelLayout& layout, In<float> values, Index row,
               std::uint8_t* to) {
  if (layout.scale == ScaleWords::kFloat32)
    put_words<ScaleWords::kFloat32>(what, values, row, to);
  else if (layout.scale == ScaleWords::kBf16)
    put_words<ScaleWords::kBf16>(what, values, row, to);
  else
    put_words<ScaleWords::kFp16>(what, values, row, to);
}

void put_zeros(const PanelLayout& layout, In<float> zeros, Index row, std::uint8_t* to) {
  const float* from = zeros.data() + row * zeros.outerStride();
  const bool bytes = layout.zeros == Zeros::kBytes;
  bool good = true;
  for (Index g = 0; !bytes && g < zeros.cols(); ++g) good &= from[g] == layout.middle;
  for (Index g = 0; bytes && g < zeros.cols(); ++g) {
    const float zero = std::min(std::max(0.0F, from[g]), 255.0F);  // 0 for NaN
    to[g * kPanelRows] = static_cast<std::uint8_t>(zero);
    good &= static_cast<float>(to[g * kPanelRows]) == from[g];
  }
  for (Index g = 0; !good && g < zeros.cols(); ++g) {
    const float zero = from[g];
    require(bytes || zero == layout.middle, "[pack_linear] zeros must all be ", layout.middle,
            " in a symmetric scheme, got ", zero);
    require(!bytes || (zero >= 0.0F && zero <= 255.0F && zero == std::floor(zero)),
            "[pack_linear] zeros must be integers from 0 to 255, got ", zero);
  }
}

float read_zero(const PanelLayout& layout, Index cell, const std::uint8_t* panel) {
  if (layout.zeros == Zeros::kMiddle) return layout.middle;
  if (layout.zeros == Zeros::kBytes) return static_cast<float>(panel[layout.zeros_at + cell]);
  return read_word(layout, panel + layout.zeros_at + cell * word_bytes(layout));
}

void require_panels(const char* op, const PanelLayout& layout, Index rows, Index columns,
                    Index panels, Index bytes) {
  require(columns == layout.k && panels == ceil_div(rows, kPanelRows) && bytes == layout.bytes, "[",
          op, "] panels must be ", ceil_div(rows, kPanelRows), " x ", layout.bytes, " for ", rows,
          " x ", layout.k, " codes, got ", panels, " x ", bytes, " for ", rows, " x ", columns);
}

void clear(std::uint8_t* panel, Index begin, Index end) {
  std::memset(panel + begin, 0, static_cast<std::size_t>(end - begin));
}

// The scales and zero points of a panel's rows, 0 before.
void put_sides(const PanelLayout& layout, In<float> scales, In<float> zeros, Index first,
               Index lanes, std::uint8_t* panel) {
  for (Index lane = 0; lane < lanes; ++lane) {
    put_words("scales", layout, scales, first + lane, panel + lane * word_bytes(layout));
    std::uint8_t* at = panel + layout.zeros_at;
    if (layout.zeros == Zeros::kOffsets)
      put_words("zeros", layout, zeros, first + lane, at + lane * word_bytes(layout));
    else
      put_zeros(layout, zeros, first + lane, at + lane);
  }
}

}  // namespace

PanelLayout panel_layout(const Grid& grid, Index k, Index group, bool symmetric,
                         const std::string& scale) {
  require(k > 0 && group > 0 && group <= k, "[pack_linear] group must be 1 to k = ", k, ", got ",
          group);
  require(grid.bits >= 1 && grid.bits <= 8, "[pack_linear] bits must be 1 to 8, got ", grid.bits);
  require(scale == "bf16" || scale == "fp16" || scale == "fp32",
          "[pack_linear] scales must be kept as bf16, fp16 or fp32, got ", scale);
  PanelLayout layout = {};
  layout.k = k;
  layout.group = group;
  layout.groups = ceil_div(k, group);
  layout.group_strips = ceil_div(group, kStrip);
  layout.strips =
      (layout.groups - 1) * layout.group_strips + ceil_div(k - (layout.groups - 1) * group, kStrip);
  layout.table = !grid.levels.empty();
  layout.width = layout.table ? 4 : grid.bits <= 2 ? 2 : grid.bits <= 4 ? grid.bits : 8;
  layout.scale = scale == "bf16"   ? ScaleWords::kBf16
                 : scale == "fp16" ? ScaleWords::kFp16
                                   : ScaleWords::kFloat32;
  layout.zeros = grid.offset ? Zeros::kOffsets : symmetric ? Zeros::kMiddle : Zeros::kBytes;
  layout.middle = layout.table ? 0.0F : static_cast<float>(1 << (grid.bits - 1));
  layout.dot_zero = 1 << (grid.bits - 1);
  layout.unit = 1.0F;
  if (layout.table) set_levels(grid.levels, layout);
  const Index cells = layout.groups * kPanelRows;
  layout.zeros_at = lines(cells * word_bytes(layout));
  layout.codes_at = layout.zeros_at;
  if (layout.zeros == Zeros::kBytes) layout.codes_at += lines(cells);
  if (layout.zeros == Zeros::kOffsets) layout.codes_at += lines(cells * word_bytes(layout));
  layout.bytes = layout.codes_at + code_bytes(layout);
  return layout;
}

void pack_linear(In<std::uint8_t> codes, In<float> scales, In<float> zeros, int bits,
                 const PanelLayout& layout, Out<std::uint8_t> panels) {
  const Index n = codes.rows();
  require_panels("pack_linear", layout, n, codes.cols(), panels.rows(), panels.cols());
  require_codes("pack_linear", n, layout.k, layout.group, scales, zeros);
  parallel_for(panels.rows(), [&](Index p) {
    std::uint8_t* panel = panels.data() + p * panels.outerStride();
    const Index first = p * kPanelRows, lanes = std::min<Index>(kPanelRows, n - first);
    clear(panel, 0, layout.bytes);
    put_sides(layout, scales, zeros, first, lanes, panel);
    const std::uint8_t* from = codes.data() + first * codes.outerStride();
    for (Index lane = 0; lane < lanes; ++lane) {
      const std::uint8_t* row = from + lane * codes.outerStride();
      std::uint8_t all = 0;
      for (Index j = 0; j < layout.k; ++j) all |= row[j];
      require(all >> bits == 0, "[pack_linear] codes must fit in ", bits, " bits, got ", int(all),
              " or less in row ", first + lane);
    }
    with_width(layout, [&](auto width) {
      put_strips<width>(layout, from, codes.outerStride(), 0, {0, layout.strips}, lanes, panel);
    });
  });
}

void pack_linear_u32(In<std::uint32_t> words, In<float> scales, In<float> zeros, int bits,
                     const PanelLayout& layout, Out<std::uint8_t> panels) {
  const Index n = words.rows();
  require_panels("pack_linear", layout, n, layout.k, panels.rows(), panels.cols());
  require_codes("pack_linear", n, layout.k, layout.group, scales, zeros);
  require(bits >= 1 && bits <= layout.width && words.cols() == ceil_div(layout.k * bits, 32),
          "[pack_linear] words must be ", n, " x ", ceil_div(layout.k * bits, 32), " for rows of ",
          layout.k, " codes of ", bits, " bits, ", layout.width, " at most, got ", n, " x ",
          words.cols());
  parallel_for(panels.rows(), [&](Index p) {
    std::uint8_t* panel = panels.data() + p * panels.outerStride();
    const Index first = p * kPanelRows, lanes = std::min<Index>(kPanelRows, n - first);
    const Index whole = bits == layout.width ? turned_strips(layout) : 0;
    clear(panel, 0, layout.codes_at);
    clear(panel, layout.codes_at + whole * bits / 2 * kLine, layout.bytes);
    put_sides(layout, scales, zeros, first, lanes, panel);
    const std::uint32_t* from = words.data() + first * words.outerStride();
    with_width(layout, [&](auto width) {
      put_turned<width>(layout, from, words.outerStride(), whole, lanes, panel);
      put_unpacked<width>(layout, from, words.outerStride(), bits, whole, lanes, panel);
    });
  });
}

void unpack_linear(In<std::uint8_t> panels, const PanelLayout& layout, Out<std::uint8_t> codes,
                   Out<float> scales, Out<float> zeros) {
  const Index n = codes.rows();
  require_panels("unpack_linear", layout, n, codes.cols(), panels.rows(), panels.cols());
  require_codes("unpack_linear", n, layout.k, layout.group, scales, zeros);
  parallel_for(panels.rows(), [&](Index p) {
    std::uint8_t* panel = const_cast<std::uint8_t*>(panels.data() + p * panels.outerStride());
    for (Index lane = 0; lane < std::min<Index>(kPanelRows, n - p * kPanelRows); ++lane) {
      const Index row = p * kPanelRows + lane;
      for (Index g = 0; g < layout.groups; ++g) {
        const Index cell = g * kPanelRows + lane;
        scales(row, g) = read_word(layout, panel + cell * word_bytes(layout));
        zeros(row, g) = read_zero(layout, cell, panel);
      }
      std::uint8_t* to = codes.data() + row * codes.outerStride();
      with_width(layout, [&](auto width) {
        each_strip(layout, {0, layout.strips}, [&](Index strip, Index column, Index columns) {
          std::uint8_t padded[kStrip];
          get_strip<width>(layout, panel, strip, lane, padded);
          std::memcpy(to + column, padded, static_cast<std::size_t>(columns));
        });
      });
    }
  });
}

Packed::Packed(In<std::uint8_t> bytes, Index rows, const PanelLayout& how)
    : panels(bytes.data()), n(rows), layout(how) {
  require_panels("linear", layout, n, layout.k, bytes.rows(), bytes.cols());
  require(bytes.outerStride() == layout.bytes, "[linear] panels must be contiguous, got strided");
}

}  // namespace bitwright
