// Row panels and left operands for the register tiles, and the checks that several ops share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "core/buffer.h"
#include "core/check.h"
#include "core/parallel.h"
#include "core/view.h"
#include "kernels/dispatch.h"

namespace bitwright {

inline constexpr Index kTurned = 64;  // columns of a panel that are transposed at a time, in L1

// f(row, column, panel entry) for `rows` rows and `columns` columns of a panel [column][nr], in an
// order that suits both; `ahead`: the address of an entry, whose next columns are fetched.
template <class F, class Ahead>
inline void each_turned(Index nr, Index rows, Index columns, const F& f, const Ahead& ahead) {
  for (Index first = 0; first < columns; first += kTurned)
    for (Index lane = 0; lane < rows; ++lane) {
      const Index end = std::min(columns, first + kTurned), next = std::min(columns, end + kTurned);
      for (Index p = end; p < next; p += 16)
        __builtin_prefetch(ahead(lane, std::min(p + 15, next - 1)));
      for (Index p = first; p < end; ++p) f(lane, p, p * nr + lane);
    }
}

// panel[p][lane] = w(row + lane, column + p) for p < columns; rows past the end are zero.
inline void load_panel(In<float> w, Index row, Index column, Index columns, float* panel,
                       Index nr = table().nr_f32) {
  const Index rows = std::min(nr, w.rows() - row);
  if (rows < nr) std::memset(panel, 0, static_cast<std::size_t>(columns * nr) * sizeof(float));
  const float* from = w.data() + row * w.outerStride() + column;
  const auto at = [&](Index lane, Index p) { return from + lane * w.outerStride() + p; };
  each_turned(
      nr, rows, columns, [&](Index lane, Index p, Index i) { panel[i] = *at(lane, p); }, at);
}

// A matrix as left operand of the tile: slices of mr columns, zero past the end, cut into parts of
// chain_columns() rows, [part][slice][row][mr], so that what a pass over a part reads lies
// together.
class LeftSlices {
 public:
  // at(p, i): the matrix, in memory one after the other along i, or turned, along p. room: where
  // floats() of them may lie as long as this lives; null: it has its own. kernels: whose tile takes
  // them.
  template <class At>
  LeftSlices(Index rows, Index columns, const At& at, bool turned = false, float* room = nullptr,
             const Table& kernels = table())
      : kernels_(&kernels),
        mr_(kernels.mr_f32),
        chain_(chain_columns()),
        rows_(rows),
        slices_(ceil_div(columns, mr_)),
        own_(room == nullptr ? floats(rows, columns, kernels) : 0),
        data_(room == nullptr ? own_.get() : room) {
    const Index band = turned ? chain_ : 16;  // rows at a time, as they lie in memory
    parallel_for(ceil_div(rows, band), [&](Index task) {
      const Index first = task * band, end = std::min(rows, first + band);
      for (Index s = 0; s < slices_; ++s) {
        const Index width = std::min(mr_, columns - s * mr_);
        float* to = data_ + offset(first, s);
        if (turned)
          for (Index i = 0; i < width; ++i)
            for (Index p = first; p < end; ++p) to[(p - first) * mr_ + i] = at(p, s * mr_ + i);
        else
          for (Index p = first; p < end; ++p)
            for (Index i = 0; i < width; ++i) to[(p - first) * mr_ + i] = at(p, s * mr_ + i);
        for (Index p = first; p < end; ++p, to += mr_) std::fill(to + width, to + mr_, 0.0F);
      }
    });
  }
  static Index floats(Index rows, Index columns, const Table& kernels = table()) {
    return rows * ceil_div(columns, kernels.mr_f32) * kernels.mr_f32;
  }
  const Table& kernels() const { return *kernels_; }
  Index rows() const { return rows_; }
  Index slices() const { return slices_; }
  Index mr() const { return mr_; }

  // c [mr][nr] += rows [from, to) of slice s times right [to - from][nr].
  void add(Index s, Index from, Index to, const float* right, float* c) const {
    const Index nr = kernels_->nr_f32;
    while (from < to) {
      const Index end = std::min(to, (from / chain_ + 1) * chain_);
      kernels_->tile_f32(end - from, data_ + offset(from, s), mr_, right, c, nr);
      right += (end - from) * nr;
      from = end;
    }
  }

  // The same for the rows [at, end) of numbers that ascend, in the place of a range.
  void add(Index s, const std::int32_t* at, const std::int32_t* end, const float* right,
           float* c) const {
    const Index nr = kernels_->nr_f32;
    while (at < end) {
      const Index part = *at / chain_ * chain_;
      const std::int32_t* next = std::lower_bound(at, end, part + chain_);
      kernels_->tile_f32_of(next - at, at, data_ + offset(part, s) - part * mr_, mr_, right, c, nr);
      right += (next - at) * nr;
      at = next;
    }
  }

 private:
  Index offset(Index p, Index s) const {
    const Index part = p / chain_ * chain_;
    return (part * slices_ + s * std::min(chain_, rows_ - part) + p - part) * mr_;
  }

  const Table* kernels_;
  Index mr_, chain_, rows_, slices_;
  Buffer<float> own_;
  float* data_;
};

// Panels that a task takes, `most` or fewer: there are tasks enough for the threads.
inline Index panels_of_task(Index panels, Index most) {
  constexpr Index kTasksPerThread = 3;
  return std::clamp<Index>(panels / (kTasksPerThread * thread_count().load()), 1, most);
}

// c(panel) [slice][mr][nr] += left times the k columns of right(panel) [k][nr], the chains along k
// a part after the other, so that the right operand of a tile stays in L1 and the left ones serve
// all panels from L2. Of an upper triangular matrix, whose columns from `first` on are left, the
// rows below a slice are left out; else first = k.
template <class Right, class C>
inline void multiply(const LeftSlices& left, Index k, Index panels, Index first, const Right& right,
                     const C& c) {
  const Index nr = left.kernels().nr_f32, mr = left.mr(), chain = chain_columns();
  for (Index p = 0; p < k; p += chain)
    for (Index panel = 0; panel < panels; ++panel)
      for (Index s = std::max<Index>(p - first, 0) / mr; s < left.slices(); ++s)
        left.add(s, p, std::min({p + chain, k, first + (s + 1) * mr}), right(panel) + p * nr,
                 c(panel) + s * mr * nr);
}

// Half of a symmetric block of H: its upper triangle with half the diagonal, by parts of kColumns
// columns and the rows down to their last one.
class Half {
 public:
  Half(In<double> h, Index first, Index columns) : k_(columns) {
    for (Index begin = 0; begin < k_; begin += kColumns) {
      const Index end = std::min(k_, begin + kColumns);
      parts_.emplace_back(end, end - begin, [&](Index p, Index i) {
        if (p > begin + i) return 0.0F;
        const double entry = h(first + p, first + begin + i);
        return static_cast<float>(p == begin + i ? 0.5 * entry : entry);
      });
    }
  }

  // Adds e H e^T = 2 e half e^T of each lane of the panels e [panel][k][nr] to loss [panel][nr].
  // The zeros below the diagonal of a slice add nothing, so its height changes no bit.
  void quadratic(Index panels, const float* e, double* loss) const {
    const Index nr = table().nr_f32, size = std::min(k_, kColumns) * nr + table().mr_f32 * nr;
    Buffer<float> product(panels * size);
    Index first = 0;
    for (const LeftSlices& part : parts_) {
      const Index end = std::min(k_, first + kColumns);
      std::fill(product.get(), product + panels * size, 0.0F);
      multiply(
          part, end, panels, first, [&](Index panel) { return e + panel * k_ * nr; },
          [&](Index panel) { return product + panel * size; });
      for (Index panel = 0; panel < panels; ++panel)
        for (Index i = first; i < end; ++i)
          for (Index lane = 0; lane < nr; ++lane)
            loss[panel * nr + lane] +=
                2.0 * static_cast<double>(product[panel * size + (i - first) * nr + lane]) *
                static_cast<double>(e[(panel * k_ + i) * nr + lane]);
      first = end;
    }
  }

 private:
  static constexpr Index kColumns = 768;  // a multiple of every mr
  Index k_;
  std::vector<LeftSlices> parts_;
};

inline void require_codes(const char* op, Index n, Index k, Index group, In<float> scales,
                          In<float> zeros) {
  require(group > 0, "[", op, "] group must be positive, got ", group);
  const Index groups = ceil_div(k, group);
  require(
      scales.rows() == n && scales.cols() == groups && zeros.rows() == n && zeros.cols() == groups,
      "[", op, "] scales and zeros must be ", n, " x ", groups, " for a ", n, " x ", k,
      " matrix in groups of ", group, ", got ", scales.rows(), " x ", scales.cols(), " and ",
      zeros.rows(), " x ", zeros.cols());
}

// Beyond this a weight or an entry of H is damage, and a sum of products could leave float32's
// range.
inline constexpr double kLargest = 0x1p56;

// Whether a row has an entry that is not finite or beyond kLargest; as integers, whose order is
// that of the magnitudes, so that it takes no branch.
template <class T>
inline bool damaged(const T* row, Index count) {
  using Word = std::conditional_t<sizeof(T) == 8, std::int64_t, std::int32_t>;
  const T limit = static_cast<T>(kLargest);
  Word most, any = 0;
  std::memcpy(&most, &limit, sizeof most);
  for (Index j = 0; j < count; ++j) {
    Word bits;
    std::memcpy(&bits, row + j, sizeof bits);
    any |= most - (bits & std::numeric_limits<Word>::max());
  }
  return any < 0;
}

template <class T>
inline void require_finite(const char* op, const char* what,
                           const Eigen::Ref<const RowMajor<T>>& x) {
  parallel_for(x.rows(), [&](Index r) {
    const T* row = x.data() + r * x.outerStride();
    if (!damaged(row, x.cols())) return;
    for (Index j = 0; j < x.cols(); ++j)
      require(std::abs(row[j]) <= static_cast<T>(kLargest), "[", op, "] ", what,
              " must be finite and at most 2^56, got ", row[j], " at (", r, ", ", j, ")");
  });
}

inline void require_scales(const char* op, In<float> scales) {
  require_finite(op, "scales", scales);
  for (Index r = 0; r < scales.rows(); ++r)
    for (Index g = 0; g < scales.cols(); ++g)
      require(scales(r, g) != 0.0F, "[", op, "] scales must not be 0, got 0 at (", r, ", ", g, ")");
}

inline void require_permutation(const char* op, Index k, InVec<std::int32_t> order) {
  require(order.size() == k, "[", op, "] order must have ", k, " entries, got ", order.size());
  std::vector<bool> seen(static_cast<std::size_t>(k));
  for (Index i = 0; i < k; ++i) {
    const bool fresh = order[i] >= 0 && order[i] < k && !seen[static_cast<std::size_t>(order[i])];
    require(fresh, "[", op, "] order must be a permutation of 0 .. ", k - 1, ", got ", order[i],
            " at ", i);
    seen[static_cast<std::size_t>(order[i])] = true;
  }
}

inline void require_square(const char* op, Index k, In<double> h) {
  require(h.rows() == k && h.cols() == k, "[", op, "] H must be ", k, " x ", k, " to match k = ", k,
          ", got ", h.rows(), " x ", h.cols());
}

}  // namespace bitwright
