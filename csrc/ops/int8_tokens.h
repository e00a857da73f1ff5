// Tokens as int8 for the products of packed weights. A segment of up to 128 columns of a group
// shares a scale; where its squared step is more than 4 times the mean of the token's others (an
// outlier among its columns), what rounding left is rounded once more, to a 254th of the step: a
// second digit, multiplied like the first. (SmolLM2 at 4 bits in groups of 64: 9 % of the segments,
// and what int8 adds to the KL of the weights falls from 8.4 to 3 %.)
#pragma once

#include <memory>
#include <type_traits>
#include <vector>

#include "core/parallel.h"
#include "ops.h"
#include "ops/panel.h"

namespace bitwright {

constexpr double kTaskNanoseconds = 1e4;  // below two of these no thread is started

template <class T>
void widen_row(const T* from, Index count, float* to) {
  if constexpr (std::is_same_v<T, float>)
    std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
  else
    table().widen_bf16(count, from, to);
}

// A row of x, padded as the codes are: x itself where that is the same.
template <class T>
const float* padded_row(const PanelLayout& layout, const T* row, float* buffer) {
  const bool whole = layout.group_strips * kStrip == layout.group || layout.groups == 1;
  const bool padded = !whole || layout.k % kStrip != 0;
  if constexpr (std::is_same_v<T, float>)
    if (!padded) return row;
  if (padded) std::fill(buffer, buffer + layout.strips * kStrip, 0.0F);
  if (whole) {
    widen_row(row, layout.k, buffer);
    return buffer;
  }
  for (Index g = 0; g < layout.groups; ++g)
    widen_row(row + g * layout.group, std::min(layout.group, layout.k - g * layout.group),
              buffer + g * layout.group_strips * kStrip);
  return buffer;
}

// All tokens, once for all matrices of one group size, in tiles:
// [tile][strip][4][tokens of the tile], or by token.
class Int8Tokens {
 public:
  template <class T>
  Int8Tokens(In<T> x, const PanelLayout& layout, bool per_token)
      : layout_(layout),
        per_token_(per_token),
        tokens_(x.rows()),
        by_token_(table().tokens_by_token > 0 && tokens_ >= kManyTokens),
        tiles_(ceil_div(tokens_, by_token_         ? table().tokens_by_token
                                 : paired(tokens_) ? table().pair_tokens
                                                   : table().dot_tokens)),
        segment_(per_token ? kTokenSegment : kGroupSegment),
        segments_((layout.groups - 1) * segments_of(0) + segments_of(layout.groups - 1)),
        quads_(tokens_ * row() + 12),
        scale_(tokens_ * segments_),
        sum_(tokens_ * segments_),
        finer_(static_cast<std::size_t>(tiles_)) {
    const auto one = [&](Index tile) {
      Buffer<float> floats(layout_.strips * kStrip);
      const Index first = begin(tile), count = begin(tile + 1) - first;
      const auto padded = [&](Index t) {
        return padded_row(layout_, x.data() + (first + t) * x.outerStride(), floats.get());
      };
      for (Index t = 0; t < count; ++t)
        table().quantize_row(layout_, segment_, per_token_, padded(t),
                             by_token_ ? 1 : static_cast<int>(count), static_cast<int>(count),
                             quads_ + first * row() + (by_token_ ? t * row() : t),
                             scale_ + first * scales() + t, sum_ + first * segments_ + t);
      if (!per_token_) add_digits(tile, padded);
    };
    if (double(tokens_) * double(layout.k) * 0.3 < 2 * kTaskNanoseconds)
      for (Index tile = 0; tile < tiles_; ++tile) one(tile);
    else
      parallel_for(tiles_, one);
  }
  // Whether so many go in tiles of dot_pair; dot_tile takes them, too.
  static bool paired(Index tokens) {
    return table().dot_pair != nullptr && table().tokens_by_token == 0 &&
           tokens > table().dot_tokens;
  }
  Index begin(Index tile) const { return tokens_ * tile / tiles_; }
  Index tiles() const { return tiles_; }
  Index segment() const { return segment_; }
  Index cells() const { return tokens_ * layout_.groups; }
  // [tile][group][token]: what the codes of a token in a group come to, times -zero.
  void shifts(float zero, float* to) const {
    for (Index i = 0; i < tiles_; ++i) {
      const Index first = begin(i), count = begin(i + 1) - first;
      const Finer& finer = finer_[static_cast<std::size_t>(i)];
      Index number = 0, digit = 0;
      for (Index g = 0; g < layout_.groups; ++g, to += count) {
        std::fill(to, to + count, 0.0F);
        const auto add = [&](const std::int32_t* sum, const float* scale) {
          for (Index t = 0; t < count; ++t)
            to[t] += static_cast<float>(sum[t]) * (per_token_ ? 1.0F : scale[t]);
        };
        for (Index s = segments_of(g); s > 0; --s, ++number) {
          const Index at = first * segments_ + number * count;
          add(sum_ + at, per_token_ ? nullptr : scale_ + at);
          if (digit < finer.count() && finer.at[static_cast<std::size_t>(digit)] == number) {
            add(finer.sum.data() + digit * count, finer.scale.data() + digit * count);
            ++digit;
          }
        }
        for (Index t = 0; t < count; ++t) to[t] *= -zero;
      }
    }
  }
  DotTokens tile(Index tile, const float* shift) const {
    const Index first = begin(tile);
    const Finer& finer = finer_[static_cast<std::size_t>(tile)];
    return {static_cast<int>(begin(tile + 1) - first),
            per_token_,
            by_token_,
            segment_,
            quads_ + first * row(),
            scale_ + first * scales(),
            shift + first * layout_.groups,
            finer.count(),
            finer.at.data(),
            finer.quads.data(),
            finer.scale.data()};
  }

 private:
  static constexpr Index kManyTokens = 8;  // from here on by token, where the level has that
  // Strips: as many as share a scale; per token as many as leave sums in 32 bits.
  static constexpr Index kGroupSegment = 8, kTokenSegment = 64;
  static constexpr float kStandsOut = 4.0F;

  // Segments of a tile with a second digit in any of its tokens; 0 in the others.
  struct Finer {
    std::vector<std::int64_t> at;
    std::vector<std::int32_t> quads;
    std::vector<float> scale;
    std::vector<std::int32_t> sum;
    Index count() const { return static_cast<Index>(at.size()); }
  };

  template <class Row>
  void add_digits(Index tile, const Row& padded) {
    const Index first = begin(tile), count = begin(tile + 1) - first;
    const float* scale = scale_ + first * segments_;
    std::vector<std::uint8_t> wanted(static_cast<std::size_t>(segments_ * count));
    Finer& finer = finer_[static_cast<std::size_t>(tile)];
    for (Index t = 0; t < count; ++t) {
      float total = 0.0F;
      for (Index s = 0; s < segments_; ++s) total += scale[s * count + t] * scale[s * count + t];
      for (Index s = 0; s < segments_; ++s) {
        const float square = scale[s * count + t] * scale[s * count + t];
        const bool stands_out =
            square * static_cast<float>(segments_ - 1) > kStandsOut * (total - square);
        wanted[static_cast<std::size_t>(s * count + t)] = stands_out ? 1 : 0;
      }
    }
    for (Index s = 0; s < segments_; ++s) {
      const auto* row = wanted.data() + s * count;
      if (std::any_of(row, row + count, [](std::uint8_t w) { return w != 0; }))
        finer.at.push_back(s);
    }
    if (finer.at.empty()) return;
    const auto digits = static_cast<std::size_t>(finer.count() * count);
    finer.quads.resize(digits * static_cast<std::size_t>(segment_) * 4 + 12);
    finer.scale.resize(digits);
    finer.sum.resize(digits);
    for (Index t = 0; t < count; ++t) {
      const float* x = nullptr;
      for (Index i = 0; i < finer.count(); ++i) {
        const Index s = finer.at[static_cast<std::size_t>(i)], each = segment_ * 4;
        if (wanted[static_cast<std::size_t>(s * count + t)] == 0) continue;
        if (x == nullptr) x = padded(t);
        const Index g = s / segments_of(0), strip = first_strip(s);
        const Index end = std::min(layout_.strips, (g + 1) * layout_.group_strips);
        const float step = scale[s * count + t];
        std::int32_t* quads = finer.quads.data() + i * count * each + (by_token_ ? t * each : t);
        table().second_digit(std::min(segment_, end - strip), x + strip * kStrip, step,
                             by_token_ ? 1 : static_cast<int>(count), quads,
                             finer.sum.data() + i * count + t);
        finer.scale[static_cast<std::size_t>(i * count + t)] = step / 254.0F;
      }
    }
  }
  Index first_strip(Index segment) const {
    const Index each = segments_of(0);
    return segment / each * layout_.group_strips + segment % each * segment_;
  }
  Index segments_of(Index group) const {
    const Index left = layout_.strips - group * layout_.group_strips;
    return ceil_div(std::min(left, layout_.group_strips), segment_);
  }
  Index scales() const { return per_token_ ? 1 : segments_; }
  Index row() const { return layout_.strips * 4; }

  PanelLayout layout_;
  bool per_token_;
  Index tokens_;
  bool by_token_;
  Index tiles_, segment_, segments_;
  Buffer<std::int32_t> quads_;
  Buffer<float> scale_;
  Buffer<std::int32_t> sum_;
  std::vector<Finer> finer_;
};

// One matrix's view of the tokens: what its zero points take away.
struct Int8Operand {
  const Int8Tokens* tokens;
  Buffer<float> shift;

  Int8Operand(const Int8Tokens& x, const PanelLayout& layout) : tokens(&x), shift(x.cells()) {
    x.shifts(layout.zeros == Zeros::kMiddle ? float(layout.dot_zero) : 1.0F, shift.get());
  }
  DotTokens tile(Index i) const { return tokens->tile(i, shift.get()); }
};

}  // namespace bitwright
