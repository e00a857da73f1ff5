// Column statistics: one column per lane over the rows in order, sums in double; what is known of a
// vector of columns stays in registers while the rows pass. And rows of bf16 words in pairs.
#include "kernels/simd.h"
#include "kernels/table.h"

namespace bitwright::BITWRIGHT_ISA_NAME {

namespace {

using VH = float __attribute__((vector_size(kBytes / 2)));  // as many floats as a VD has doubles

inline float magnitude(float x) { return x < 0.0F ? -x : x; }

inline VD add_size(VD sum, const float* x) {
  const VH value = load<VH>(x);
  return sum + __builtin_convertvector(value < 0.0F ? -value : value, VD);
}

}  // namespace

void column_sums(std::int64_t rows, std::int64_t columns, const float* x, std::int64_t ldx,
                 const ColumnSums& sums) {
  std::int64_t j = 0;
  for (; j + kF32 <= columns; j += kF32) {
    VD low = load<VD>(sums.absolute + j), high = load<VD>(sums.absolute + j + kF64);
    VF most = load<VF>(sums.abs_max + j);
    VF smallest = load<VF>(sums.minimum + j), largest = load<VF>(sums.maximum + j);
    const float* from = x + j;
    for (std::int64_t i = 0; i < rows; ++i, from += ldx) {
      const VF value = load<VF>(from);
      low = add_size(low, from);
      high = add_size(high, from + kF64);
      most = maximum(absolute(value), most);
      smallest = minimum(value, smallest);
      largest = maximum(value, largest);
    }
    store(sums.absolute + j, low);
    store(sums.absolute + j + kF64, high);
    store(sums.abs_max + j, most);
    store(sums.minimum + j, smallest);
    store(sums.maximum + j, largest);
  }
  for (; j < columns; ++j)
    for (std::int64_t i = 0; i < rows; ++i) {
      const float value = x[i * ldx + j], size = magnitude(value);
      sums.absolute[j] += static_cast<double>(size);
      sums.abs_max[j] = size > sums.abs_max[j] ? size : sums.abs_max[j];
      sums.minimum[j] = value < sums.minimum[j] ? value : sums.minimum[j];
      sums.maximum[j] = value > sums.maximum[j] ? value : sums.maximum[j];
    }
}

#if defined(BITWRIGHT_BF16_PAIRS)
void pair_words(std::int64_t count, const std::uint16_t* low, const std::uint16_t* high,
                std::uint32_t* pairs) {
  for (std::int64_t j = 0; j < count; ++j)
    pairs[j] = low[j] | static_cast<std::uint32_t>(high[j]) << 16;
}
#endif

}  // namespace bitwright::BITWRIGHT_ISA_NAME
