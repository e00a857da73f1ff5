// A check, a count, random matrices: all that the C++ tests need of a framework.
#pragma once

#include <atomic>
#include <cstdio>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>

#include "core/parallel.h"
#include "core/view.h"
#include "kernels/dispatch.h"
#include "ops.h"

namespace bitwright_tests {

using namespace bitwright;  // NOLINT

inline std::atomic<int> passed{0}, failed{0};

inline void report(bool ok, const char* what, const char* file, int line) {
  (ok ? passed : failed).fetch_add(1);
  if (!ok) std::printf("%s:%d: failed: %s\n", file, line, what);
}
#define CHECK(...) ::bitwright_tests::report((__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__)

// The text of the std::invalid_argument that `f` throws, "" if it throws none.
inline std::string refusal(const std::function<void()>& f) {
  try {
    f();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

template <class T>
using Vector = Eigen::Matrix<T, Eigen::Dynamic, 1>;

inline const Vector<float> kNone;  // no weights, no factors

inline RowMajor<float> normal(Index rows, Index columns, unsigned seed, float size = 1.0F) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> draw(0.0F, size);
  RowMajor<float> x(rows, columns);
  for (Index i = 0; i < x.size(); ++i) x.data()[i] = draw(engine);
  return x;
}

inline RowMajor<std::uint8_t> random_codes(Index rows, Index columns, int bits, unsigned seed) {
  std::mt19937 engine(seed);
  RowMajor<std::uint8_t> codes(rows, columns);
  for (Index i = 0; i < codes.size(); ++i)
    codes.data()[i] = static_cast<std::uint8_t>(engine() >> (32 - bits));
  return codes;
}

// X^T X / t of correlated inputs, upper and lower triangle.
inline RowMajor<double> hessian(Index k, unsigned seed) {
  const RowMajor<float> x = normal(3 * k + 5, k, seed);
  RowMajor<double> wide = x.cast<double>();
  for (Index j = 1; j < k; ++j) wide.col(j) += 0.7 * wide.col(j - 1);
  return wide.transpose() * wide / static_cast<double>(wide.rows());
}

inline Vector<std::int32_t> reversed(Index k) {
  Vector<std::int32_t> order(k);
  for (Index i = 0; i < k; ++i) order[i] = static_cast<std::int32_t>(k - 1 - i);
  return order;
}

// Runs f with 1, 2 and 3 threads and compares what it returns.
template <class F>
auto for_every_thread_count(const F& f) {
  thread_count().store(1);
  const auto want = f();
  for (int threads = 2; threads <= 3; ++threads) {
    thread_count().store(threads);
    CHECK(f() == want);
  }
  return want;
}

struct Size {
  Index n, k, group;
};
// One row, one column, panels (12, 24, 48 rows) and blocks (48 columns) cut short and just filled.
inline constexpr Size kSizes[] = {{1, 1, 1},    {1, 7, 3},    {5, 1, 4},    {11, 40, 16},
                                  {24, 48, 48}, {47, 49, 32}, {49, 97, 10}, {101, 145, 64}};

}  // namespace bitwright_tests
