// A matrix in panels of 16 rows, as the kernels of `linear` read it: plain data, no code.
//
// A panel is [scales][zeros][codes], each padded to 64 bytes; the same bytes at every level.
//   scales  [group][16] float32, or bf16 or fp16 words
//   zeros   none where all are `middle`; else [group][16] bytes; or offsets, as scales are stored
//   codes   [strip][...]: a strip is 16 columns of a group, of the last one fewer, padded with 0
// A quad, 64 bytes, is 4 columns of the 16 rows: byte 4 lane + t is row `lane`, column t. A strip
// is 4 quads, stored by width, bits from low to high:
//   8  4 quads                             4  2 units of 64 bytes: quads 0 | 1, quads 2 | 3
//   2  1 unit: quads 0 | 1 | 2 | 3         3  2 strips in 3 units: the low 2 bits of the codes of
//      each strip as for 2, then bit 2 of the quads 0 .. 3 of the first, 0 .. 3 of the second
#pragma once

#include <cstdint>

namespace bitwright {

inline constexpr int kPanelRows = 16, kStrip = 16;

enum class ScaleWords : int { kFloat32, kBf16, kFp16 };
enum class Zeros : int { kMiddle, kBytes, kOffsets };

struct PanelLayout {
  std::int64_t k, group;              // columns of a row, of a group
  std::int64_t groups, group_strips;  // groups of a row, strips of a group that is whole
  std::int64_t strips;                // of a row
  int width;                          // bits of a stored code: 2, 3, 4, 8
  ScaleWords scale;
  Zeros zeros;
  float middle;      // the zero point that all groups share
  bool table;        // value = levels[code] * scale
  float levels[16];  // of tables
  // Values for int8 products, about level = (dot_levels[code] - dot_zero) * unit; no table: unit 1,
  // codes as they are.
  std::uint8_t dot_levels[16];
  int dot_zero;
  float unit;
  std::int64_t zeros_at, codes_at, bytes;  // in a panel
};

// Tokens as int8. A segment is a run of strips of one group with one scale of the activations.
// [strip][4][tokens] quads of 4 columns, by token [tokens][strip][4] and 48 bytes behind the last
// that can be read; [segment][tokens] scales (one per token: only [tokens]); [group][tokens] what
// is added for each unit of zero point or offset, or for the middle. Segments number `finer`,
// ascending, have a second digit: quads like the others', each of `segment` strips, and scales.
struct DotTokens {
  int tokens;
  bool per_token, by_token;
  std::int64_t segment;  // strips
  const std::int32_t* quads;
  const float* scale;
  const float* shift;
  std::int64_t finer_count;
  const std::int64_t* finer;
  const std::int32_t* finer_quads;
  const float* finer_scale;
};

// Strips begin .. end - 1 of two panels and room for them: codes as bytes, [strip][4][panel][64],
// scales and zero points or offsets of their groups, [group][panel][16]. A block begins and ends
// where a segment does.
struct DotPair {
  const PanelLayout* layout;
  const std::uint8_t* panel[2];
  std::int64_t begin, end;
  std::uint8_t* quads;
  float *scales, *zeros;
};

}  // namespace bitwright
