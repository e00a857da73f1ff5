// gptq, quadratic, the AWQ ops and qlinear over the same sizes.
#include <cmath>

#include "check.h"

namespace bitwright_tests {

namespace {

constexpr double kUnit = 0x1p-24;

struct Chosen {
  RowMajor<float> scales, zeros, steps;
};

RowMajor<float> steps_of(const RowMajor<float>& w, const FitSettings& settings) {
  const Index groups = ceil_div(w.cols(), settings.group);
  const Index blocks = settings.block == 0 ? 0 : ceil_div(groups, settings.block);
  return RowMajor<float>::Constant(w.rows(), blocks * (settings.grid.offset ? 2 : 1), 0x1p-9F);
}

Chosen grid_of(const RowMajor<float>& w, const FitSettings& settings) {
  const Index groups = ceil_div(w.cols(), settings.group);
  Chosen grid{RowMajor<float>(w.rows(), groups), RowMajor<float>(w.rows(), groups),
              steps_of(w, settings)};
  fit(w, kNone, settings, kNone, grid.steps, grid.scales, grid.zeros);
  return grid;
}

RowMajor<double> error_of(const RowMajor<float>& w, const RowMajor<std::uint8_t>& codes,
                          const Chosen& grid, Index group, bool offset = false) {
  RowMajor<float> q(w.rows(), w.cols());
  decode(codes, grid.scales, grid.zeros, group, {8, {}, {}, offset}, q);
  return w.cast<double>() - q.cast<double>();
}

void gptq_of(const Size& size, int bits) {
  const FitSettings settings{{bits, {}, {}}, size.group, false};
  const RowMajor<float> w = normal(size.n, size.k, unsigned(size.k), 0.05F);
  const Chosen grid = grid_of(w, settings);
  const Vector<std::int32_t> order = reversed(size.k);
  RowMajor<double> h = hessian(size.k, 3);
  RowMajor<float> r(size.k, size.k);
  CHECK(factor(h, order, Vector<std::uint8_t>::Zero(size.k), 0.01, r));
  Vector<double> loss(size.n);
  const RowMajor<std::uint8_t> codes = for_every_thread_count([&] {
    RowMajor<std::uint8_t> out(size.n, size.k);
    gptq(w, r, order, grid.scales, grid.zeros, size.group, {bits, {}, {}}, out, loss);
    return out;
  });
  const RowMajor<double> e = error_of(w, codes, grid, size.group);
  h.diagonal().array() += 0.01;
  const Vector<double> exact = (e * h).cwiseProduct(e).rowwise().sum();
  const Vector<double> scale = (e.cwiseAbs() * h.diagonal().cwiseSqrt()).cwiseAbs2();
  const Vector<double> weights = w.cast<double>().cwiseAbs2() * h.diagonal();
  // tests/test_recursion.py's limit, with sum_p R_pp^2 w_p^2 <= sum_p h_pp w_p^2 and the like
  const Vector<double> limit = kUnit * ((2.0 * static_cast<double>(size.k) + 70.0) * scale.array() +
                                        2.0 * (scale.array() * weights.array()).sqrt());
  CHECK(((loss - exact).array().abs() <= limit.array()).all());
  RowMajor<std::uint8_t> plain(size.n, size.k), with_identity(size.n, size.k);
  encode(w, grid.scales, grid.zeros, size.group, {bits, {}, {}}, plain);
  gptq(w, RowMajor<float>::Identity(size.k, size.k), order, grid.scales, grid.zeros, size.group,
       {bits, {}, {}}, with_identity, loss);
  CHECK(plain == with_identity);
}

// Scales searched inside the sweep, then refined: the same for any thread count, losses that are
// the objective's, and refinement never above where it began.
void searched_of(const Size& size, const FitSettings& settings) {
  const RowMajor<float> w = normal(size.n, size.k, unsigned(size.k), 0.05F);
  const bool offset = settings.grid.offset;
  Vector<std::int32_t> order(size.k);
  for (Index i = 0; i < size.k; ++i) order[i] = static_cast<std::int32_t>(i);
  const RowMajor<double> h = hessian(size.k, 3);
  RowMajor<float> r(size.k, size.k);
  Vector<std::uint8_t> dead = Vector<std::uint8_t>::Zero(size.k);
  CHECK(factor(h, order, dead, 0.01, r));
  Vector<float> factors(3);
  factors << 1.0F, 0.8F, 0.9F;
  const Index groups = ceil_div(size.k, size.group);
  Chosen grid{RowMajor<float>(size.n, groups), RowMajor<float>(size.n, groups),
              steps_of(w, settings)};
  Vector<double> before(size.n), after(size.n), same(size.n);
  const RowMajor<std::uint8_t> codes = for_every_thread_count([&] {
    RowMajor<std::uint8_t> out(size.n, size.k);
    gptq_search(w, r, order, settings, factors, grid.steps, grid.scales, grid.zeros, out, before);
    return out;
  });
  RowMajor<std::uint8_t> with_scales(size.n, size.k);
  gptq(w, r, order, grid.scales, grid.zeros, size.group, settings.grid, with_scales, same);
  CHECK(with_scales == codes);
  const Chosen found = grid;
  const RowMajor<std::uint8_t> revised = for_every_thread_count([&] {
    RowMajor<std::uint8_t> out = codes;
    grid = found;
    refine(w, h, dead, 0.01, settings, "clclc", 1e-4, grid.steps, grid.scales, grid.zeros, out,
           after);
    return out;
  });
  RowMajor<double> hd = h;
  hd.diagonal().array() += 0.01;
  const RowMajor<double> e = error_of(w, revised, grid, size.group, offset);
  const Vector<double> exact = (e * hd).cwiseProduct(e).rowwise().sum();
  const Vector<double> room = before.array() * 1e-4 + 1e-12;
  CHECK((exact.array() <= (before + room).array()).all());
  CHECK(((after - exact).array().abs() <= room.array() + 1e-4 * exact.array()).all());
}

// Integers with zero points, with offsets, and both with scales of two levels.
void searched_of(const Size& size, int bits) {
  FitSettings settings{{bits, {}, {}}, size.group, bits % 2 == 0, 0, "bf16",
                       1.0F,           2.0,        true,          1, true};
  searched_of(size, settings);
  settings.block = 2;
  settings.scale_bits = 6;
  searched_of(size, settings);
  settings.symmetric = false;
  settings.grid.offset = true;
  settings.scale_grid = "fp16";
  searched_of(size, settings);
  settings.block = 0;
  searched_of(size, settings);
}

void drift_of(const Size& size) {
  const RowMajor<float> w = normal(size.n, size.k, 12);
  const RowMajor<double> h = hessian(size.k, 13), c = hessian(size.k, 14);
  const RowMajor<double> d = normal(size.n, size.k, 15).cast<double>();
  const Vector<std::int32_t> order = reversed(size.k);
  RowMajor<float> r(size.k, size.k);
  CHECK(factor(h, order, Vector<std::uint8_t>::Zero(size.k), 0.1, r));
  const RowMajor<float> delta = for_every_thread_count([&] {
    RowMajor<float> out(size.n, size.k);
    drift(w, c, d, r, order, out);
    return out;
  });
  RowMajor<double> hd = h;
  hd.diagonal().array() += 0.1;
  const RowMajor<double> want = w.cast<double>() * c + d, got = delta.cast<double>() * hd;
  CHECK((got - want).cwiseAbs().maxCoeff() <= 1e-4 * want.cwiseAbs().maxCoeff());
}

void refusals() {
  const RowMajor<float> w = normal(3, 8, 1);
  Chosen grid = grid_of(w, {{4, {}, {}}, 4});
  RowMajor<float> r = RowMajor<float>::Identity(8, 8), small = RowMajor<float>::Identity(7, 7);
  RowMajor<std::uint8_t> codes(3, 8);
  Vector<double> loss(3);
  Vector<std::int32_t> order = reversed(8);
  const auto refuse = [&](const RowMajor<float>& factor) {
    return refusal(
        [&] { gptq(w, factor, order, grid.scales, grid.zeros, 4, {4, {}, {}}, codes, loss); });
  };
  CHECK(refuse(r).empty());
  CHECK(contains(refuse(small), "R must be 8 x 8 to match W (3 x 8), got 7 x 7"));
  r(5, 5) = -1.0F;
  CHECK(contains(refuse(r), "R must have a positive diagonal, got -1 at 5"));
  r(5, 5) = std::nanf("");
  CHECK(contains(refuse(r), "R must be finite"));
  r(5, 5) = 1.0F;
  grid.scales(2, 1) = 0.0F;
  CHECK(contains(refuse(r), "scales must not be 0, got 0 at (2, 1)"));
  grid.scales(2, 1) = 1.0F;
  order[3] = 8;
  CHECK(contains(refuse(r), "permutation of 0 .. 7, got 8 at 3"));
}

void awq_of(const Size& size) {
  const FitSettings settings{{3, {}, {}}, size.group, false};
  const RowMajor<float> w = normal(size.n, size.k, 5);
  const RowMajor<double> h = hessian(size.k, 6);
  const Chosen grid = grid_of(w, settings);
  RowMajor<std::uint8_t> codes(size.n, size.k);
  encode(w, grid.scales, grid.zeros, size.group, {3, {}, {}}, codes);
  const RowMajor<double> e = error_of(w, codes, grid, size.group);
  const double exact = (e * h).cwiseProduct(e).sum();
  const double limit = (static_cast<double>(size.k) + 4.0) * kUnit *
                       (e.cwiseAbs() * h.cwiseAbs()).cwiseProduct(e.cwiseAbs()).sum();
  CHECK(std::abs(quadratic(e.cast<float>(), h) - exact) <= limit);
  const RowMajor<float> ones = RowMajor<float>::Ones(3, size.k);
  const Vector<double> losses = for_every_thread_count([&] {
    Vector<double> out(3);
    awq_scale(w, h, ones, settings, out);
    return out;
  });
  CHECK(losses[0] == losses[2] && std::abs(losses[0] - exact) <= limit);
  Vector<float> factors = Vector<float>::Constant(1, 1.0F);
  Chosen clipped = grid;
  clipped.scales.setZero();
  awq_clip(w, h, settings, factors, clipped.scales, clipped.zeros);
  CHECK(clipped.scales == grid.scales && clipped.zeros == grid.zeros);
}

void linear_of(const Size& size, Index t) {
  const RowMajor<std::uint8_t> codes = random_codes(size.n, size.k, 4, 8);
  const Index groups = ceil_div(size.k, size.group);
  const RowMajor<float> scales = normal(size.n, groups, 9, 0.01F).cwiseAbs();
  const RowMajor<float> zeros = random_codes(size.n, groups, 4, 10).cast<float>();
  const RowMajor<float> x = normal(t, size.k, 11);
  const RowMajor<float> y = for_every_thread_count([&] {
    RowMajor<float> out(t, size.n);
    qlinear(x, codes, scales, zeros, size.group, out);
    return out;
  });
  RowMajor<float> values(size.n, size.k);
  decode(codes, scales, zeros, size.group, {}, values);
  const RowMajor<double> exact = x.cast<double>() * values.cast<double>().transpose();
  const RowMajor<double> bound =
      x.cast<double>().cwiseAbs() * values.cast<double>().cwiseAbs().transpose();
  const double chain = 1.01 * static_cast<double>(size.k) * kUnit;
  CHECK(((y.cast<double>() - exact).array().abs() <= chain * bound.array()).all());
}

}  // namespace

void solve() {
  for (const Size& size : kSizes)
    for (const int bits : {1, 2, 4, 8}) gptq_of(size, bits);
  for (const Size& size : kSizes)
    for (const int bits : {2, 3}) searched_of(size, bits);
  for (const Size& size : kSizes) drift_of(size);
  refusals();
}

void awq() {
  for (const Size& size : kSizes) awq_of(size);
  Chosen grid = grid_of(normal(2, 8, 1), {{4, {}, {}}, 8});
  const std::string text = refusal([&] {
    awq_clip(normal(2, 8, 1), hessian(8, 1), {{4, {}, {}}, 8}, kNone, grid.scales, grid.zeros);
  });
  CHECK(contains(text, "factors must have at least 1 entry"));
}

void linear() {
  for (const Size& size : kSizes)
    for (const Index t : {0, 1, 3, 8, 17}) linear_of(size, t);
}

}  // namespace bitwright_tests
