// Row panels and left operands for the register tiles, and the checks that several ops share.
#pragma once

#include <algorithm>
#include <cstring>

#include "core/buffer.h"
#include "core/check.h"
#include "core/view.h"
#include "kernels/dispatch.h"

namespace bitwright {

// panel[p][lane] = w(row + lane, column + p) for p < columns; rows past the end are zero.
inline void load_panel(In<float> w, Index row, Index column, Index columns, float* panel) {
  const Index nr = table().nr_f32, rows = std::min<Index>(nr, w.rows() - row);
  if (rows < nr) std::memset(panel, 0, static_cast<std::size_t>(columns * nr) * sizeof(float));
  for (Index lane = 0; lane < rows; ++lane) {
    const float* from = w.data() + (row + lane) * w.outerStride() + column;
    for (Index p = 0; p < columns; ++p) panel[p * nr + lane] = from[p];
  }
}

// A matrix as left operand of the tile: slices of mr columns, each [rows][mr], zero past the end.
class LeftSlices {
 public:
  template <class At>
  LeftSlices(Index rows, Index columns, const At& at)
      : mr_(table().mr_f32),
        rows_(rows),
        slices_(ceil_div(columns, mr_)),
        data_(rows * slices_ * mr_) {
    for (Index s = 0; s < slices_; ++s)
      for (Index p = 0; p < rows; ++p)
        for (Index i = 0; i < mr_; ++i)
          data_[(s * rows + p) * mr_ + i] = s * mr_ + i < columns ? at(p, s * mr_ + i) : 0.0F;
  }
  Index slices() const { return slices_; }
  Index mr() const { return mr_; }
  const float* slice(Index s) const { return data_ + s * rows_ * mr_; }

 private:
  Index mr_, rows_, slices_;
  Buffer<float> data_;
};

// Adds e H e^T of each lane of the panel e [k][nr] to loss [nr], H symmetric as LeftSlices (k, k).
inline void panel_quadratic(const LeftSlices& h, Index k, const float* e, double* loss) {
  const Index nr = table().nr_f32, mr = h.mr();
  Buffer<float> product(mr * nr);
  for (Index s = 0; s < h.slices(); ++s) {
    std::memset(product.get(), 0, static_cast<std::size_t>(mr * nr) * sizeof(float));
    table().tile_f32(k, h.slice(s), mr, e, product.get(), nr);
    for (Index i = 0; i < std::min(mr, k - s * mr); ++i)
      for (Index lane = 0; lane < nr; ++lane)
        loss[lane] += static_cast<double>(product[i * nr + lane]) *
                      static_cast<double>(e[(s * mr + i) * nr + lane]);
  }
}

inline void require_codes(const char* op, Index n, Index k, Index group, In<float> scales,
                          In<std::uint8_t> zeros) {
  require(group > 0, "[", op, "] group must be positive, got ", group);
  const Index groups = ceil_div(k, group);
  require(
      scales.rows() == n && scales.cols() == groups && zeros.rows() == n && zeros.cols() == groups,
      "[", op, "] scales and zeros must be ", n, " x ", groups, " for a ", n, " x ", k,
      " matrix in groups of ", group, ", got ", scales.rows(), " x ", scales.cols(), " and ",
      zeros.rows(), " x ", zeros.cols());
}

inline void require_square(const char* op, Index k, In<double> h) {
  require(h.rows() == k && h.cols() == k, "[", op, "] H must be ", k, " x ", k, " to match k = ", k,
          ", got ", h.rows(), " x ", h.cols());
}

}  // namespace bitwright
