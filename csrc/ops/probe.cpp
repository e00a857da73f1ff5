// The machine's limits, for `bitwright bench`: each row of x is a task of its own.
#include "core/half.h"
#include "core/parallel.h"
#include "ops.h"
#include "ops/panel.h"

namespace bitwright {

namespace {

constexpr Index kBlockBytes = 1536;  // of the widest level's registers

template <class T, class Row>
void each_row(Index rounds, Out<T> x, const Row& row) {
  const Index block = kBlockBytes / Index{sizeof(T)};
  require(x.cols() % block == 0, "[chain] x must have a multiple of ", block, " columns, got ",
          x.cols());
  require(rounds >= 0, "[chain] rounds must not be negative, got ", rounds);
  parallel_for(x.rows(), [&](Index r) { row(x.data() + r * x.outerStride()); });
}

std::uint32_t twice(float value) { return to_bf16(value) * 0x10001U; }

}  // namespace

void chain_f32(Index rounds, double a, double b, Out<float> x) {
  each_row<float>(rounds, x, [&](float* row) {
    table().chain_f32(x.cols(), rounds, static_cast<float>(a), static_cast<float>(b), row);
  });
}

void chain_f64(Index rounds, double a, double b, Out<double> x) {
  each_row<double>(rounds, x, [&](double* row) { table().chain_f64(x.cols(), rounds, a, b, row); });
}

void chain_bf16(Index rounds, double a, double b, Out<float> x) {
  require(table().chain_bf16 != nullptr, "[chain] level ", table().isa,
          " has no product of bf16 pairs");
  const std::uint32_t left = twice(static_cast<float>(a)), right = twice(static_cast<float>(b));
  each_row<float>(rounds, x,
                  [&](float* row) { table().chain_bf16(x.cols(), rounds, left, right, row); });
}

void word_sum(In<std::uint64_t> x, OutVec<std::uint64_t> sums) {
  require(sums.size() == x.rows(), "[word_sum] sums must have ", x.rows(), " entries, got ",
          sums.size());
  parallel_for(x.rows(), [&](Index r) {
    std::uint64_t sum = 0;
    table().word_sum(x.cols(), x.data() + r * x.outerStride(), &sum);
    sums[r] = sum;
  });
}

void dot_chain(Index rounds, int code, int byte, Out<std::int32_t> x) {
  each_row<std::int32_t>(
      rounds, x, [&](std::int32_t* row) { table().dot_chain(x.cols(), rounds, code, byte, row); });
}

}  // namespace bitwright
