// y = x W^T of matrices in panels. Fast: the tokens become int8 once for all matrices of one group
// size, in tiles of at most dot_tokens, and every panel meets every tile. Exact: up to 4 tokens
// multiply weights in registers; more go through the float tiles, 48 rows of weights at a time.
// Which task computes what changes no bit: an output is one chain, of one kernel call after
// another.
#include <memory>
#include <type_traits>

#include "ops.h"
#include "ops/panel.h"

namespace bitwright {

namespace {

constexpr Index kFewTokens = 4;           // exact: as many as multiply_rows takes
constexpr Index kManyTokens = 8;          // fast: from here on by token, where the level has that
constexpr Index kTileRows = 48;           // rows that fill right operands at every level
constexpr Index kBlockStrips = 32;        // exact: columns of 48 rows as floats that stay in L2
constexpr Index kMostPanels = 16;         // of a task: their codes stay in L2 while the tokens pass
constexpr double kTaskNanoseconds = 1e4;  // below two of these no thread is started
// Segments: as long as int8 tokens share a scale; per token as long as sums fit in 32 bits.
constexpr Index kGroupSegment = 2, kTokenSegment = 64;

Index panels_of(const Packed& w) { return ceil_div(w.n, kPanelRows); }

bool same_columns(const PanelLayout& a, const PanelLayout& b) {
  return a.group == b.group || a.groups + b.groups == 2;
}

// Panels of all matrices as one row of tasks, each a range of one matrix's.
class Tasks {
 public:
  Tasks(const std::vector<const Packed*>& weights, Index tokens, Index unit) {
    double cost = 0.0;
    Index panels = 0;
    for (const Packed* w : weights) {
      cost += double(panels_of(*w)) * double(w->layout.strips) * (4.0 + 1.2 * double(tokens));
      panels += panels_of(*w);
    }
    const Index affordable = std::max<Index>(static_cast<Index>(cost / kTaskNanoseconds), 1);
    const Index wanted = std::min<Index>(affordable, 4 * thread_count().load());
    Index size = std::min(kMostPanels, ceil_div(panels, wanted));
    if (affordable < 2 || thread_count().load() == 1) size = kMostPanels;
    size = ceil_div(size, unit) * unit;
    for (std::size_t i = 0; i < weights.size(); ++i)
      for (Index p = 0; p < panels_of(*weights[i]); p += size)
        tasks_.push_back({i, p, std::min(panels_of(*weights[i]), p + size)});
    alone_ = affordable < 2;
  }
  template <class F>
  void run(const F& f) const {
    const auto one = [&](Index i) {
      const Task& task = tasks_[static_cast<std::size_t>(i)];
      f(task.matrix, task.begin, task.end);
    };
    const Index count = static_cast<Index>(tasks_.size());
    if (!alone_) return parallel_for(count, one);
    for (Index i = 0; i < count; ++i) one(i);
  }

 private:
  struct Task {
    std::size_t matrix;
    Index begin, end;
  };
  std::vector<Task> tasks_;
  bool alone_;
};

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

// Results of panels begin .. end - 1 for tokens from `first` on: float32 is written where it
// belongs, unless a panel is cut short.
template <class T>
struct Result {
  T* y;
  Index n;

  float* place(Index begin, Index end, Index first, float* buffer, Index* ldy) const {
    if constexpr (std::is_same_v<T, float>) {
      if (end * kPanelRows <= n) {
        *ldy = n;
        return y + first * n + begin * kPanelRows;
      }
    }
    *ldy = (end - begin) * kPanelRows;
    return buffer;
  }
  void keep(Index begin, Index end, Index first, Index tokens, const float* from, Index ld) const {
    const Index row = begin * kPanelRows, rows = std::min(n, end * kPanelRows) - row;
    for (Index t = 0; t < tokens; ++t) {
      T* to = y + (first + t) * n + row;
      if (static_cast<const void*>(to) == static_cast<const void*>(from)) return;
      if constexpr (std::is_same_v<T, float>)
        std::copy(from + t * ld, from + t * ld + rows, to);
      else
        table().narrow_bf16(rows, from + t * ld, to);
    }
  }
};

template <class T>
std::vector<Result<T>> results(const std::vector<const Packed*>& weights, Index tokens, T* y) {
  std::vector<Result<T>> found;
  for (const Packed* w : weights) {
    found.push_back({y, w->n});
    y += tokens * w->n;
  }
  return found;
}

// All tokens as int8, in tiles: [tile][strip][4][tokens of the tile], or by token.
class Quantized {
 public:
  template <class T>
  Quantized(In<T> x, const PanelLayout& layout, bool per_token)
      : layout_(layout),
        per_token_(per_token),
        tokens_(x.rows()),
        by_token_(table().tokens_by_token > 0 && tokens_ >= kManyTokens),
        tiles_(ceil_div(x.rows(), by_token_ ? table().tokens_by_token : table().dot_tokens)),
        segment_(per_token ? kTokenSegment : kGroupSegment),
        segments_((layout.groups - 1) * segments_of(0) + segments_of(layout.groups - 1)),
        quads_(tokens_ * row() + 12),
        scale_(tokens_ * segments_),
        sum_(tokens_ * segments_) {
    const auto one = [&](Index tile) {
      Buffer<float> floats(layout_.strips * kStrip);
      const Index first = begin(tile), count = begin(tile + 1) - first;
      for (Index t = 0; t < count; ++t) {
        const T* from = x.data() + (first + t) * x.outerStride();
        table().quantize_row(layout_, segment_, per_token_, padded_row(layout_, from, floats.get()),
                             by_token_ ? 1 : static_cast<int>(count), static_cast<int>(count),
                             quads_ + first * row() + (by_token_ ? t * row() : t),
                             scale_ + first * scales() + t, sum_ + first * segments_ + t);
      }
    };
    if (double(tokens_) * double(layout.k) * 0.3 < 2 * kTaskNanoseconds)
      for (Index tile = 0; tile < tiles_; ++tile) one(tile);
    else
      parallel_for(tiles_, one);
  }
  Index begin(Index tile) const { return tokens_ * tile / tiles_; }
  Index tiles() const { return tiles_; }
  Index cells() const { return tokens_ * layout_.groups; }
  // [tile][group][token]: what the codes of a token in a group come to, times -zero.
  void shifts(float zero, float* to) const {
    for (Index i = 0; i < tiles_; ++i) {
      const Index first = begin(i), count = begin(i + 1) - first;
      const std::int32_t* sum = sum_ + first * segments_;
      const float* scale = scale_ + first * scales();
      for (Index g = 0; g < layout_.groups; ++g, to += count) {
        std::fill(to, to + count, 0.0F);
        for (Index s = segments_of(g); s > 0; --s, sum += count, scale += per_token_ ? 0 : count)
          for (Index t = 0; t < count; ++t)
            to[t] += static_cast<float>(sum[t]) * (per_token_ ? 1.0F : scale[t]);
        for (Index t = 0; t < count; ++t) to[t] *= -zero;
      }
    }
  }
  DotTokens tile(Index tile, const float* shift) const {
    const Index first = begin(tile);
    return {static_cast<int>(begin(tile + 1) - first),
            per_token_,
            by_token_,
            segment_,
            quads_ + first * row(),
            scale_ + first * scales(),
            shift + first * layout_.groups};
  }

 private:
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
};

// One matrix's view of the tokens: what its zero points take away.
struct Operand {
  const Quantized* tokens;
  Buffer<float> shift;

  Operand(const Quantized& x, const PanelLayout& layout) : tokens(&x), shift(x.cells()) {
    x.shifts(layout.zeros == Zeros::kMiddle ? float(layout.dot_zero) : 1.0F, shift.get());
  }
  DotTokens tile(Index i) const { return tokens->tile(i, shift.get()); }
};

template <class T>
void run_fast(In<T> x, const std::vector<const Packed*>& weights, bool per_token, T* y) {
  std::vector<std::unique_ptr<Quantized>> quantized;
  std::vector<Operand> operands;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const PanelLayout& layout = weights[i]->layout;
    if (i == 0 || !same_columns(layout, weights[i - 1]->layout))
      quantized.push_back(std::make_unique<Quantized>(x, layout, per_token));
    operands.emplace_back(*quantized.back(), layout);
  }
  const auto to = results(weights, x.rows(), y);
  Tasks(weights, x.rows(), 1).run([&](std::size_t matrix, Index begin, Index end) {
    const Packed& w = *weights[matrix];
    const Operand& operand = operands[matrix];
    alignas(64) float buffer[16 * kPanelRows];
    for (Index tile = 0; tile < operand.tokens->tiles(); ++tile) {
      const DotTokens tokens = operand.tile(tile);
      const Index first = operand.tokens->begin(tile);
      for (Index p = begin; p < end; ++p) {
        Index ldy = 0;
        float* out = to[matrix].place(p, p + 1, first, buffer, &ldy);
        table().dot_tile(w.layout, w.panels + p * w.layout.bytes, tokens, out, ldy);
        to[matrix].keep(p, p + 1, first, tokens.tokens, out, ldy);
      }
    }
  });
}

template <class T>
void run_few(In<T> x, const std::vector<const Packed*>& weights, T* y) {
  const Index t = x.rows();
  std::vector<Buffer<float>> padded;
  for (const Packed* w : weights) {
    const Index width = w->layout.strips * kStrip;
    padded.emplace_back(t * width);
    for (Index i = 0; i < t; ++i) {
      float* row = padded.back() + i * width;
      const float* from = padded_row(w->layout, x.data() + i * x.outerStride(), row);
      if (from != row) std::copy(from, from + width, row);
    }
  }
  const auto to = results(weights, t, y);
  Tasks(weights, t, 4).run([&](std::size_t matrix, Index begin, Index end) {
    const Packed& w = *weights[matrix];
    Buffer<float> buffer(t * (end - begin) * kPanelRows);
    Index ldy = 0;
    float* out = to[matrix].place(begin, end, 0, buffer.get(), &ldy);
    table().multiply_rows(w.layout, w.panels + begin * w.layout.bytes, end - begin,
                          static_cast<int>(t), padded[matrix].get(), w.layout.strips * kStrip, out,
                          ldy);
    to[matrix].keep(begin, end, 0, t, out, ldy);
  });
}

Index column_of(const PanelLayout& layout, Index strip) {
  if (strip >= layout.strips) return layout.k;
  const Index g = strip / layout.group_strips;
  return g * layout.group + (strip - g * layout.group_strips) * kStrip;
}

// c [slice][operand][mr][nr] = left times the 48 rows of the panels begin .. end - 1.
void multiply_tiles(const Packed& w, Index begin, Index end, const LeftSlices& left, float* c) {
  const Index nr = table().nr_f32, mr = table().mr_f32, operands = kTileRows / nr;
  std::fill(c, c + left.slices() * mr * kTileRows, 0.0F);
  Buffer<float> right(kBlockStrips * kStrip * kTileRows, true);
  for (Index s = 0; s < w.layout.strips; s += kBlockStrips) {
    const Index stop = std::min(w.layout.strips, s + kBlockStrips);
    const Index column = column_of(w.layout, s), depth = column_of(w.layout, stop) - column;
    for (Index p = begin; p < end; ++p)
      table().dequantize(w.layout, w.panels + p * w.layout.bytes, s, stop,
                         static_cast<int>(p - begin), depth, right.get());
    for (Index i = 0; i < left.slices() * operands; ++i)
      left.add(i / operands, column, column + depth, right + i % operands * depth * nr,
               c + i * mr * nr);
  }
}

template <class T>
void run_many(In<T> x, const std::vector<const Packed*>& weights, T* y) {
  const Index t = x.rows(), nr = table().nr_f32, mr = table().mr_f32, unit = kTileRows / kPanelRows;
  Buffer<float> wide(std::is_same_v<T, float> ? 0 : t * x.cols());
  if constexpr (!std::is_same_v<T, float>)
    for (Index i = 0; i < t; ++i)
      widen_row(x.data() + i * x.outerStride(), x.cols(), wide + i * x.cols());
  const auto at = [&](Index p, Index i) {
    if constexpr (std::is_same_v<T, float>)
      return x(i, p);
    else
      return wide[i * x.cols() + p];
  };
  const LeftSlices left(x.cols(), t, at, true);
  const auto to = results(weights, t, y);
  Tasks(weights, 8 * t, unit).run([&](std::size_t matrix, Index begin, Index end) {
    Buffer<float> c(left.slices() * mr * kTileRows), row(kTileRows);
    for (Index p = begin; p < end; p += unit) {
      const Index stop = std::min(end, p + unit);
      multiply_tiles(*weights[matrix], p, stop, left, c.get());
      for (Index i = 0; i < t; ++i) {
        const float* from = c + i / mr * mr * kTileRows + i % mr * nr;
        for (Index lane = 0; lane < kTileRows; lane += nr, from += mr * nr)
          std::copy(from, from + nr, row + lane);
        to[matrix].keep(p, stop, i, 1, row.get(), kTileRows);
      }
    }
  });
}

template <class T>
void run(In<T> x, const std::vector<const Packed*>& weights, bool fast, bool per_token,
         OutVec<T> y) {
  Index rows = 0;
  for (const Packed* w : weights) {
    require(x.cols() == w->layout.k, "[linear] X must be t x ", w->layout.k, " to match W (", w->n,
            " x ", w->layout.k, "), got ", x.rows(), " x ", x.cols());
    rows += w->n;
  }
  require(y.size() == x.rows() * rows, "[linear] y must have ", x.rows() * rows, " entries for ",
          x.rows(), " tokens and ", rows, " rows, got ", y.size());
  if (x.rows() == 0) return;
  if (fast) return run_fast<T>(x, weights, per_token, y.data());
  if (x.rows() <= kFewTokens) return run_few<T>(x, weights, y.data());
  run_many<T>(x, weights, y.data());
}

}  // namespace

void linear_f32(In<float> x, const std::vector<const Packed*>& weights, bool fast, bool per_token,
                OutVec<float> y) {
  run<float>(x, weights, fast, per_token, y);
}

void linear_u16(In<std::uint16_t> x, const std::vector<const Packed*>& weights, bool fast,
                bool per_token, OutVec<std::uint16_t> y) {
  run<std::uint16_t>(x, weights, fast, per_token, y);
}

}  // namespace bitwright
