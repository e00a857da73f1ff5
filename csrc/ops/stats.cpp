// What calibration sums over the tokens. Gram and cross: the rows go in chunks of 512 into column
// panels (16-bit inputs are widened there, or stay bf16 where the machine multiplies it); each tile
// of products is one float32 chain over the chunk and is added to H in double, so the error does
// not grow with the number of tokens.
#include <algorithm>
#include <type_traits>

#include "core/ahead.h"
#include "core/half.h"
#include "core/parallel.h"
#include "ops.h"
#include "ops/panel.h"

namespace bitwright {

namespace {

constexpr Index kChunk = 512;
constexpr Index kPanelsPerTask = 8;  // right operands of a task: about L2
constexpr Index kRowsPerTask = 96;   // a multiple of every mr
constexpr Index kFillRows = 16;      // packed at a time; even, for pairs

struct Widen {
  static float one(float x, bool) { return x; }
  static float one(std::uint16_t x, bool bf16) { return bf16 ? from_bf16(x) : from_fp16(x); }
};

// A chunk of rows as column panels: [panel][row][nr] floats, or, where the instruction set
// multiplies bf16, [panel][pair of rows][nr] words of two bf16.
struct Floats {
  using Word = float;
  static Index depth(Index rows) { return rows; }
  static Index mr() { return table().mr_f32; }
  static bool by_row() { return false; }
  static float difference(float a, float b) { return a - b; }
  static void tile(Index depth, const float* a, Index lda, const float* b, float* c) {
    table().tile_f32(depth, a, lda, b, c, table().nr_f32);
  }
  template <class T>
  static void fill(In<T> x, bool bf16, Index first, Index rows, Index begin, Index width,
                   float* to) {
    const Index nr = table().nr_f32;
    for (Index t = 0; t < rows; ++t, to += nr) {
      const T* from = x.data() + (first + t) * x.outerStride() + begin;
      for (Index j = 0; j < width; ++j) to[j] = Widen::one(from[j], bf16);
      std::fill(to + width, to + nr, 0.0F);
    }
  }
};

struct Pairs {
  using Word = std::uint32_t;
  static Index depth(Index rows) { return ceil_div(rows, 2); }
  static Index mr() { return table().mr_pairs; }
  static bool by_row() { return table().pairs_by_row; }
  static std::uint32_t difference(std::uint32_t a, std::uint32_t b) {
    const auto half = [&](int shift) {
      const auto word = [&](std::uint32_t x) { return static_cast<std::uint16_t>(x >> shift); };
      return std::uint32_t{to_bf16(from_bf16(word(a)) - from_bf16(word(b)))} << shift;
    };
    return half(0) | half(16);
  }
  static void tile(Index depth, const std::uint32_t* a, Index lda, const std::uint32_t* b,
                   float* c) {
    table().tile_bf16(depth, a, lda, b, c, table().nr_f32);
  }
  static void fill(In<std::uint16_t> x, bool, Index first, Index rows, Index begin, Index width,
                   std::uint32_t* to) {
    const Index nr = table().nr_f32;
    for (Index t = 0; t < rows; t += 2, to += nr) {
      const std::uint16_t* low = x.data() + (first + t) * x.outerStride() + begin;
      const std::uint16_t* high = low + x.outerStride();
      if (t + 1 < rows)
        table().pair_words(width, low, high, to);
      else
        std::copy(low, low + width, to);
      std::fill(to + width, to + nr, 0U);
    }
  }
};

// Row by row, as x lies in memory.
template <class Layout, class T>
void fill_panels(In<T> x, bool bf16, Index first, Index rows, typename Layout::Word* panels) {
  const Index k = x.cols(), nr = table().nr_f32, depth = Layout::depth(rows);
  parallel_for(ceil_div(rows, kFillRows), [&](Index task) {
    const Index row = task * kFillRows, count = std::min(kFillRows, rows - row);
    for (Index panel = 0; panel < ceil_div(k, nr); ++panel)
      Layout::fill(x, bf16, first + row, count, panel * nr, std::min(nr, k - panel * nr),
                   panels + (panel * depth + Layout::depth(row)) * nr);
  });
}

// h[row0 .. row1) of one column panel += left^T right; both are panels. What the chains reach after
// chain_columns() rows waits in c; h is fetched meanwhile, up to the line of its last entry:
// NumPy's arrays do not begin on one.
template <class Layout>
void add_tiles(const typename Layout::Word* left, const typename Layout::Word* right, Index depth,
               Index row0, Index row1, Index panel, float* c, Ahead& ahead, Out<double> h) {
  const Index nr = table().nr_f32, mr = Layout::mr(), column = panel * nr;
  const Index across = Layout::by_row() ? depth : 1, along = Layout::by_row() ? 1 : nr;
  const Index width = std::min(nr, h.cols() - column);
  const Index rows = std::min(ceil_div(row1 - row0, mr) * mr, h.rows() - row0);
  const Index step = chain_columns(), tiles = ceil_div(depth, step) * ceil_div(row1 - row0, mr);
  Index tile = 0, fetched = 0;
  for (Index p = 0; p < depth; p += step)
    for (Index i = row0; i < row1; i += mr) {
      for (++tile; fetched * tiles < tile * rows; ++fetched)
        for (Index j = 0; j < width + 7; j += 8)
          __builtin_prefetch(&h(row0 + fetched, column + std::min(j, width - 1)), 1, 2);
      float* sums = c + (i - row0) * nr;
      if (p == 0) std::fill(sums, sums + mr * nr, 0.0F);
      ahead.step();
      Layout::tile(std::min(step, depth - p),
                   left + i / nr * depth * nr + i % nr * across + p * along,
                   Layout::by_row() ? depth : nr, right + (panel * depth + p) * nr, sums);
      if (p + step < depth || i >= h.rows()) continue;
      table().widen_add(std::min(mr, h.rows() - i), width, sums, nr, &h(i, column),
                        h.outerStride());
    }
}

// left[i] -= right[i] over a chunk's panels.
template <class Layout>
void subtract(typename Layout::Word* left, const typename Layout::Word* right, Index panels,
              Index size) {
  parallel_for(panels, [&](Index p) {
    for (Index i = p * size; i < (p + 1) * size; ++i)
      left[i] = Layout::difference(left[i], right[i]);
  });
}

// [panel][depth][nr] as [panel][nr][depth].
template <class Word>
void turn_panels(const Word* from, Index panels, Index depth, Word* to) {
  const Index nr = table().nr_f32;
  constexpr Index kBlock = 16;
  parallel_for(panels, [&](Index panel) {
    const Word* left = from + panel * depth * nr;
    Word* turned = to + panel * depth * nr;
    for (Index p = 0; p < depth; p += kBlock)
      for (Index i = 0; i < nr; ++i)
        for (Index q = p; q < std::min(depth, p + kBlock); ++q)
          turned[i * depth + q] = left[q * nr + i];
  });
}

template <class T>
struct Change {
  const Eigen::Ref<const RowMajor<T>>&before, &after;
};

// h += (before - after)^T x, chunk by chunk; without a change x^T x, only the upper triangle.
template <class Layout, class T>
void add_products(const Change<T>* change, In<T> x, bool bf16, Out<double> h) {
  const Index nr = table().nr_f32, panels = ceil_div(h.cols(), nr);
  const Index left_panels = ceil_div(h.rows(), nr),
              deepest = Layout::depth(std::min(kChunk, x.rows()));
  const bool apart =
      change != nullptr && (change->after.data() != x.data() || change->after.cols() != x.cols());
  Buffer<typename Layout::Word> right(deepest * panels * nr);
  Buffer<typename Layout::Word> left(change != nullptr ? deepest * left_panels * nr : 0);
  Buffer<typename Layout::Word> turned(Layout::by_row() ? deepest * left_panels * nr : 0);
  Buffer<typename Layout::Word> after(apart ? deepest * left_panels * nr : 0);
  const Index across = ceil_div(panels, kPanelsPerTask), down = ceil_div(h.rows(), kRowsPerTask);
  for (Index first = 0; first < x.rows(); first += kChunk) {
    const Index rows = std::min(kChunk, x.rows() - first), depth = Layout::depth(rows);
    fill_panels<Layout, T>(x, bf16, first, rows, right.get());
    if (change != nullptr) {
      fill_panels<Layout, T>(change->before, bf16, first, rows, left.get());
      if (apart) fill_panels<Layout, T>(change->after, bf16, first, rows, after.get());
      subtract<Layout>(left.get(), apart ? after.get() : right.get(), left_panels, depth * nr);
    }
    const typename Layout::Word* other = change == nullptr ? right.get() : left.get();
    if (Layout::by_row()) {
      turn_panels(other, left_panels, depth, turned.get());
      other = turned.get();
    }
    parallel_for(across * down, [&](Index task) {
      const Index row0 = task % down * kRowsPerTask, panel0 = task / down * kPanelsPerTask;
      const Index row1 = std::min(h.rows(), row0 + kRowsPerTask);
      const Index panel1 = std::min(panels, panel0 + kPanelsPerTask);
      if (change == nullptr && row0 >= panel1 * nr) return;
      // the rows of the task that this thread is likely to take next
      const Index next =
          std::min(row0 / nr + kRowsPerTask / nr * thread_count().load(), left_panels);
      const Index size = std::min(kRowsPerTask / nr, left_panels - next) * depth * nr;
      const Index steps =
          (panel1 - panel0) * ceil_div(depth, chain_columns()) * (row1 - row0) / Layout::mr();
      Ahead ahead(other + next * depth * nr, size, steps);
      Buffer<float> c(kRowsPerTask * nr);
      for (Index p = panel0; p < panel1; ++p)
        add_tiles<Layout>(other, right.get(), depth, row0,
                          change == nullptr ? std::min(row1, (p + 1) * nr) : row1, p, c.get(),
                          ahead, h);
    });
  }
}

struct Words {
  bool bf16, pairs;
};

template <class T>
void products(const char* op, const Change<T>* change, In<T> x, Words words, Out<double> h) {
  const bool bf16 = words.bf16;
  if constexpr (std::is_same_v<T, std::uint16_t>) {
    require(!words.pairs || (bf16 && table().tile_bf16 != nullptr), "[", op,
            "] wanted bf16 words and an instruction set with products of bf16 pairs, got ",
            bf16 ? "bf16" : "fp16", " and ", table().isa);
    if (words.pairs) return add_products<Pairs, std::uint16_t>(change, x, bf16, h);
  }
  add_products<Floats, T>(change, x, bf16, h);
}

template <class T>
void gram(In<T> x, Words words, Out<double> h) {
  const Index k = x.cols();
  require(h.rows() == k && h.cols() == k, "[gram] H must be ", k, " x ", k, " to match X (",
          x.rows(), " x ", k, "), got ", h.rows(), " x ", h.cols());
  products<T>("gram", nullptr, x, words, h);
}

template <class T>
void cross(In<T> before, In<T> after, In<T> x, Words words, Out<double> c) {
  const Index t = x.rows(), h = before.cols();
  require(before.rows() == t && after.rows() == t && after.cols() == h, "[cross] before and after ",
          "must be ", t, " x ", h, ", got ", before.rows(), " x ", before.cols(), " and ",
          after.rows(), " x ", after.cols());
  require(c.rows() == h && c.cols() == x.cols(), "[cross] C must be ", h, " x ", x.cols(),
          " to match the change (", t, " x ", h, ") and X (", t, " x ", x.cols(), "), got ",
          c.rows(), " x ", c.cols());
  const Change<T> change{before, after};
  products<T>("cross", &change, x, words, c);
}

template <class T>
void column_stats(In<T> x, bool bf16, OutVec<double> absolute, OutVec<float> abs_max,
                  OutVec<float> minimum, OutVec<float> maximum) {
  const Index k = x.cols();
  require(absolute.size() == k && abs_max.size() == k && minimum.size() == k && maximum.size() == k,
          "[column_stats] absolute, abs_max, minimum and maximum must have ", k,
          " entries to match X (", x.rows(), " x ", k, "), got ", absolute.size(), ", ",
          abs_max.size(), ", ", minimum.size(), " and ", maximum.size());
  constexpr Index kColumns = 1024, kLine = 64;  // of a task, at most; a multiple of it
  const Index share = ceil_div(ceil_div(k, thread_count().load()), kLine) * kLine;
  const Index columns = std::clamp<Index>(share, 1, kColumns);
  parallel_for(ceil_div(k, columns), [&](Index task) {
    const Index begin = task * columns, width = std::min(columns, k - begin);
    const ColumnSums sums = {absolute.data() + begin, abs_max.data() + begin,
                             minimum.data() + begin, maximum.data() + begin};
    const T* from = x.data() + begin;
    if constexpr (std::is_same_v<T, float>) {
      table().column_sums(x.rows(), width, from, x.outerStride(), sums);
    } else {
      Buffer<float> wide(kFillRows * width);
      for (Index first = 0; first < x.rows(); first += kFillRows) {
        const Index rows = std::min(kFillRows, x.rows() - first);
        for (Index t = 0; t < rows; ++t, from += x.outerStride()) {
          if (bf16)
            table().widen_bf16(width, from, wide + t * width);
          else
            std::transform(from, from + width, wide + t * width, from_fp16);
        }
        table().column_sums(rows, width, wide.get(), width, sums);
      }
    }
  });
}

}  // namespace

void cross_f32(In<float> before, In<float> after, In<float> x, Out<double> c) {
  cross<float>(before, after, x, {}, c);
}
void cross_u16(In<std::uint16_t> before, In<std::uint16_t> after, In<std::uint16_t> x, bool bf16,
               bool pairs, Out<double> c) {
  cross<std::uint16_t>(before, after, x, {bf16, pairs}, c);
}
void gram_f32(In<float> x, Out<double> h) { gram<float>(x, {}, h); }
void gram_u16(In<std::uint16_t> x, bool bf16, bool pairs, Out<double> h) {
  gram<std::uint16_t>(x, {bf16, pairs}, h);
}

void mirror(Out<double> h) {
  require(h.rows() == h.cols(), "[mirror] H must be square, got ", h.rows(), " x ", h.cols());
  for (Index i = 0; i < h.rows(); ++i)
    for (Index j = 0; j < i; ++j) h(i, j) = h(j, i);
}

void column_stats_f32(In<float> x, OutVec<double> absolute, OutVec<float> abs_max,
                      OutVec<float> minimum, OutVec<float> maximum) {
  column_stats<float>(x, false, absolute, abs_max, minimum, maximum);
}

void column_stats_u16(In<std::uint16_t> x, bool bf16, OutVec<double> absolute,
                      OutVec<float> abs_max, OutVec<float> minimum, OutVec<float> maximum) {
  column_stats<std::uint16_t>(x, bf16, absolute, abs_max, minimum, maximum);
}

}  // namespace bitwright
