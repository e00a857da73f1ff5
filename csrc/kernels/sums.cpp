// Column statistics: one column per lane over the rows in order, sums in double.
#include "kernels/simd.h"
#include "kernels/table.h"

namespace bitwright::BITWRIGHT_ISA_NAME {

namespace {

inline float magnitude(float x) { return x < 0.0F ? -x : x; }

}  // namespace

void column_sums(std::int64_t rows, std::int64_t columns, const float* x, const ColumnSums& sums) {
  for (std::int64_t i = 0; i < rows; ++i, x += columns) {
    for (std::int64_t j = 0; j < columns; ++j) {
      const float value = x[j], size = magnitude(value);
      sums.absolute[j] += static_cast<double>(size);
      sums.abs_max[j] = size > sums.abs_max[j] ? size : sums.abs_max[j];
      sums.minimum[j] = value < sums.minimum[j] ? value : sums.minimum[j];
      sums.maximum[j] = value > sums.maximum[j] ? value : sums.maximum[j];
    }
  }
}

}  // namespace bitwright::BITWRIGHT_ISA_NAME
