// y = x W^T of matrices in panels. Fast: the tokens become int8 once for all matrices of one group
// size, in tiles, and every panel meets every tile: packed, or, where the level multiplies pairs of
// panels and there are tokens enough, as bytes, a block of columns at a time. Exact: up to 4 tokens
// multiply weights in registers; more go through the float tiles, 48 rows of weights at a time.
// Which task computes what changes no bit: an output is one chain, of one kernel call after
// another.
#include "core/ahead.h"
#include "ops.h"
#include "ops/int8_tokens.h"
#include "ops/panel.h"

namespace bitwright {

namespace {

constexpr Index kFewTokens = 4;     // exact: as many as multiply_rows takes
constexpr Index kTileRows = 48;     // rows that fill right operands at every level
constexpr Index kBlockStrips = 32;  // exact: columns of 48 rows as floats that stay in L2
constexpr Index kMostPanels = 16;   // of a task: their codes stay in L2 while the tokens pass
constexpr Index kPairRows = 2 * kPanelRows;
constexpr Index kPairStrips = 32;   // of two panels, as bytes in L1; a segment, if that is longer
constexpr Index kTilesAtOnce = 16;  // that they meet before they are unpacked again

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
      if constexpr (!std::is_same_v<T, float>)
        table().narrow_bf16(rows, from + t * ld, to);
      else if (rows == kPairRows)  // a size that is known saves a call
        std::memcpy(to, from + t * ld, kPairRows * sizeof(float));
      else
        std::copy(from + t * ld, from + t * ld + rows, to);
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

// Panels begin .. end - 1, every tile of tokens.
template <class T>
void multiply_panels(const Packed& w, const Int8Operand& x, Index begin, Index end,
                     const Result<T>& to) {
  alignas(64) float buffer[16 * kPanelRows];
  for (Index tile = 0; tile < x.tokens->tiles(); ++tile) {
    const DotTokens tokens = x.tile(tile);
    const Index first = x.tokens->begin(tile);
    for (Index p = begin; p < end; ++p) {
      Index ldy = 0;
      float* out = to.place(p, p + 1, first, buffer, &ldy);
      table().dot_tile(w.layout, w.panels + p * w.layout.bytes, tokens, out, ldy);
      to.keep(p, p + 1, first, tokens.tokens, out, ldy);
    }
  }
}

// Where a block ends that begins with a segment: whole groups, or whole segments of one.
Index end_of_block(const PanelLayout& layout, Index begin, Index segment) {
  const Index whole = layout.group_strips;
  if (whole <= kPairStrips) return std::min(layout.strips, begin + kPairStrips / whole * whole);
  const Index step = std::max(kPairStrips / segment, Index{1}) * segment;
  return std::min({begin + step, (begin / whole + 1) * whole, layout.strips});
}

// As multiply_panels, an even number of them, two at a time: a block of their codes becomes bytes
// in L1, which the tokens pass while the next block's come from memory.
template <class T>
void multiply_pairs(const Packed& w, const Int8Operand& x, Index begin, Index end,
                    const Result<T>& to) {
  constexpr Index kQuad = 64;
  const Index tiles = x.tokens->tiles(), segment = x.tokens->segment();
  const Index most = std::min(tiles, kTilesAtOnce) * table().pair_tokens;
  const Index strips = std::max(kPairStrips, segment), line = w.layout.width * kQuad / 2;
  Buffer<float> out(most * kPairRows), sums(most * kPairRows), scales(2 * strips * kPairRows);
  Buffer<std::uint8_t> quads(strips * 4 * 2 * kQuad);
  DotPair pair{&w.layout, {}, 0, 0, quads.get(), scales.get(), scales + strips * kPairRows};
  for (Index tile0 = 0; tile0 < tiles; tile0 += kTilesAtOnce) {
    const Index tile1 = std::min(tiles, tile0 + kTilesAtOnce), first = x.tokens->begin(tile0);
    for (Index p = begin; p + 2 <= end; p += 2) {
      for (int i = 0; i < 2; ++i) pair.panel[i] = w.panels + (p + i) * w.layout.bytes;
      for (pair.begin = 0; pair.begin < w.layout.strips; pair.begin = pair.end) {
        pair.end = end_of_block(w.layout, pair.begin, segment);
        table().unpack_pair(pair);
        // the block that comes next: of these panels, or with its scales of the two behind them
        const bool last = pair.end == w.layout.strips, none = last && p + 4 > end;
        const Index next = last ? 0 : pair.end;
        const Index codes = (end_of_block(w.layout, next, segment) - next) * line;
        const Index at = none ? 0 : last ? 2 * w.layout.bytes : w.layout.codes_at + next * line;
        const Index size = none ? 0 : last ? w.layout.codes_at + codes : codes;
        Ahead low(pair.panel[0] + at, size, tile1 - tile0);
        Ahead high(pair.panel[1] + at, size, tile1 - tile0);
        for (Index i = tile0; i < tile1; ++i) {
          const Index token = (x.tokens->begin(i) - first) * kPairRows;
          low.step();
          high.step();
          table().dot_pair(pair, x.tile(i), sums + token, out + token);
        }
      }
      to.keep(p, p + 2, first, x.tokens->begin(tile1) - first, out.get(), kPairRows);
    }
  }
}

template <class T>
void run_fast(In<T> x, const std::vector<const Packed*>& weights, bool per_token, T* y) {
  std::vector<std::unique_ptr<Int8Tokens>> quantized;
  std::vector<Int8Operand> operands;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const PanelLayout& layout = weights[i]->layout;
    if (i == 0 || !same_columns(layout, weights[i - 1]->layout))
      quantized.push_back(std::make_unique<Int8Tokens>(x, layout, per_token));
    operands.emplace_back(*quantized.back(), layout);
  }
  const auto to = results(weights, x.rows(), y);
  const Index unit = Int8Tokens::paired(x.rows()) ? 2 : 1;
  Tasks(weights, x.rows(), unit).run([&](std::size_t matrix, Index begin, Index end) {
    const Int8Operand& operand = operands[matrix];
    const Index paired = unit == 2 ? end - (end - begin) % 2 : begin;
    if (begin < paired) multiply_pairs(*weights[matrix], operand, begin, paired, to[matrix]);
    if (paired < end) multiply_panels(*weights[matrix], operand, paired, end, to[matrix]);
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
