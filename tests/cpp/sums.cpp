// gram, mirror, column_stats and factor: chunks of tokens, column panels and blocks cut anywhere.
#include <cmath>
#include <limits>

#include "check.h"
#include "core/half.h"

namespace bitwright_tests {

namespace {

constexpr double kUnit = 0x1p-24;

RowMajor<double> summed(const RowMajor<float>& x) {
  RowMajor<double> h = RowMajor<double>::Zero(x.cols(), x.cols());
  gram_f32(x, h);
  mirror(h);
  return h;
}

void gram_of(Index t, Index k) {
  const RowMajor<float> x = normal(t, k, unsigned(t + k));
  const RowMajor<double> h = for_every_thread_count([&] { return summed(x); });
  const RowMajor<double> wide = x.cast<double>(), exact = wide.transpose() * wide;
  const RowMajor<double> size = wide.cwiseAbs().transpose() * wide.cwiseAbs();
  const double chain = static_cast<double>(std::min<Index>(t, 512)) * kUnit;
  CHECK(((h - exact).array().abs() <= 1.01 * chain * size.array()).all());
  CHECK(h == h.transpose());
}

void cross_of(const RowMajor<float>& before, const RowMajor<float>& after,
              const RowMajor<float>& x) {
  const RowMajor<double> c = for_every_thread_count([&] {
    RowMajor<double> sum = RowMajor<double>::Zero(before.cols(), x.cols());
    cross_f32(before, after, x, sum);
    return sum;
  });
  const RowMajor<double> wide = x.cast<double>(), d = (before - after).cast<double>();
  const RowMajor<double> exact = d.transpose() * wide;
  const RowMajor<double> size = d.cwiseAbs().transpose() * wide.cwiseAbs();
  const double chain = static_cast<double>(std::min<Index>(x.rows(), 512)) * kUnit;
  CHECK(((c - exact).array().abs() <= 1.01 * chain * size.array()).all());
}

// How inputs drifted, and how other columns changed.
void cross_of(Index t, Index k) {
  const RowMajor<float> before = normal(t, k, unsigned(t + 2 * k)), x = normal(t, k, unsigned(t));
  cross_of(before, x, x);
  cross_of(normal(t, k + 7, 1), normal(t, k + 7, 2), x);
}

void gram_of_words(Index t, Index k, bool bf16, bool pairs) {
  RowMajor<std::uint16_t> words(t, k);
  RowMajor<float> x(t, k);
  std::mt19937 engine(7);
  for (Index i = 0; i < words.size(); ++i) {
    words.data()[i] = static_cast<std::uint16_t>((engine() & 0x8FFFU) | 0x3000U);
    x.data()[i] = bf16 ? from_bf16(words.data()[i]) : from_fp16(words.data()[i]);
  }
  const RowMajor<double> h = for_every_thread_count([&] {
    RowMajor<double> sums = RowMajor<double>::Zero(k, k);
    gram_u16(words, bf16, pairs, sums);
    mirror(sums);
    return sums;
  });
  const RowMajor<double> want = summed(x), wide = x.cast<double>();
  if (!pairs) {
    CHECK(h == want);
    return;
  }
  const RowMajor<double> size = wide.cwiseAbs().transpose() * wide.cwiseAbs();
  const double chain = static_cast<double>(std::min<Index>(t, 512)) * kUnit;
  CHECK(((h - want).array().abs() <= 2.02 * chain * size.array()).all());
}

void columns_of(Index t, Index k) {
  const RowMajor<float> x = normal(t, k, unsigned(t * k));
  Vector<double> absolute = Vector<double>::Zero(k);
  Vector<float> abs_max = Vector<float>::Zero(k), low = abs_max, high = abs_max;
  thread_count().store(3);
  column_stats_f32(x, absolute, abs_max, low, high);
  const RowMajor<float> positive = x.cwiseMax(0.0F), negative = x.cwiseMin(0.0F);
  bool equal = true;
  for (Index j = 0; j < k && t > 0; ++j) {
    double sum = 0.0;
    for (Index i = 0; i < t; ++i) sum += static_cast<double>(std::abs(x(i, j)));
    equal = equal && sum == absolute[j] && high[j] == positive.col(j).maxCoeff() &&
            low[j] == negative.col(j).minCoeff() && abs_max[j] == std::max(high[j], -low[j]);
  }
  CHECK(equal);
}

void half_words() {
  bool equal = true;
  for (unsigned word = 0; word < 0x10000U; ++word) {
    const int exponent = int(word >> 10 & 31U);
    if (exponent == 31) continue;
    const double mantissa = double(word & 1023U) + (exponent > 0 ? 1024.0 : 0.0);
    const double size = std::ldexp(mantissa, std::max(exponent, 1) - 25);
    const double value = (word >> 15) != 0 ? -size : size;
    equal = equal && static_cast<double>(from_fp16(static_cast<std::uint16_t>(word))) == value;
  }
  CHECK(equal);
  bool back = true;
  for (unsigned word = 0; word < 0x10000U; ++word) {
    const auto w = static_cast<std::uint16_t>(word);
    back = back && (std::isnan(from_bf16(w)) ? std::isnan(from_bf16(to_bf16(from_bf16(w))))
                                             : to_bf16(from_bf16(w)) == w);
  }
  CHECK(back);
  CHECK(to_bf16(1.00390625F) == 0x3F80 && to_bf16(1.01171875F) == 0x3F82);  // ties to even
  CHECK(std::isinf(from_fp16(0x7C00)) && std::isinf(from_fp16(0xFC00)) && from_fp16(0xFC00) < 0);
  CHECK(std::isnan(from_fp16(0x7E01)) && std::isnan(from_bf16(0x7FC1)));
}

void factor_of(Index k) {
  const RowMajor<double> h = hessian(k, unsigned(k));
  const Vector<std::int32_t> order = reversed(k);
  Vector<std::uint8_t> dead = Vector<std::uint8_t>::Zero(k);
  dead[k / 2] = k > 4 ? 1 : 0;
  const RowMajor<float> r = for_every_thread_count([&] {
    RowMajor<float> out(k, k);
    CHECK(factor(h, order, dead, 0.1, out));
    return out;
  });
  const RowMajor<double> wide = r.cast<double>(), product = wide * wide.transpose();
  bool close = true;
  for (Index i = 0; i < k; ++i)
    for (Index j = 0; j < k; ++j) {
      const bool gone = dead[order[i]] || dead[order[j]];
      const double a = gone ? 0.1 * double(i == j) : h(order[i], order[j]) + (i == j ? 0.1 : 0.0);
      const double d = (h(order[i], order[i]) + 1.0) * (h(order[j], order[j]) + 1.0);
      close = close && std::abs(product(i, j) - a) <= 2.1 * kUnit * std::sqrt(d);
      close = close && (j >= i || r(i, j) == 0.0F);
    }
  CHECK(close);
}

void refusals() {
  RowMajor<double> h = hessian(5, 1), tall(6, 5);
  RowMajor<float> r(5, 5), x = normal(3, 5, 2);
  Vector<std::int32_t> order = reversed(5);
  const Vector<std::uint8_t> dead = Vector<std::uint8_t>::Zero(5);
  CHECK(contains(refusal([&] { mirror(tall); }), "H must be square, got 6 x 5"));
  CHECK(contains(refusal([&] { gram_f32(x, tall); }), "H must be 5 x 5"));
  h(0, 4) = h(4, 0) = 1e6;
  CHECK(!factor(h, order, dead, 0.1, r));
  h(0, 4) = h(4, 0) = std::numeric_limits<double>::quiet_NaN();
  for (int threads = 1; threads <= 3; ++threads) {
    thread_count().store(threads);
    CHECK(contains(refusal([&] { factor(h, order, dead, 0.1, r); }), "H must be finite"));
  }
  order[1] = order[0];
  CHECK(contains(refusal([&] { factor(h, order, dead, 0.1, r); }), "permutation of 0 .. 4, got 4"));
}

}  // namespace

void sums() {
  const Index sizes[][2] = {{0, 5}, {1, 1}, {1, 50}, {3, 400}, {511, 24}, {513, 13}, {1100, 29}};
  for (const auto& size : sizes) {
    gram_of(size[0], size[1]);
    cross_of(size[0], size[1]);
    gram_of_words(size[0], size[1], true, false);
    gram_of_words(size[0], size[1], false, false);
    if (table().tile_bf16 != nullptr) gram_of_words(size[0], size[1], true, true);
    columns_of(size[0], size[1]);
  }
  columns_of(4, 2100);
  half_words();
}

void factors() {
  for (const Index k : {1, 2, 11, 12, 47, 48, 49, 96, 97, 145, 290}) factor_of(k);
  refusals();
}

}  // namespace bitwright_tests
