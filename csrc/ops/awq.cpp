// Activation-aware column scales and clipping (AWQ, 2306.00978), scored without a forward pass: the
// error of a candidate is tr(E H E^T), with E relative to the unscaled weights (docs/solver.md 10).
#include <cmath>
#include <limits>

#include "core/parallel.h"
#include "ops.h"
#include "ops/fit_options.h"
#include "ops/panel.h"

namespace bitwright {

namespace {

constexpr Index kPanelsPerTask = 2;

// error [columns][nr] = w / s - value on the grid / s, for one group of a panel; s may be null.
void round_group(float top, Index columns, const float* w, const float* column_scale,
                 const float* scale, const float* zero, float* error) {
  const Index nr = table().nr_f32;
  for (Index j = 0; j < columns; ++j)
    for (Index lane = 0; lane < nr; ++lane) {
      const float value = w[j * nr + lane];
      const float raw = std::nearbyint(value / scale[lane]) + zero[lane];
      const float code = std::min(std::max(raw, 0.0F), top);
      const float e = value - (code - zero[lane]) * scale[lane];
      error[j * nr + lane] = column_scale == nullptr ? e : e / column_scale[j];
    }
}

}  // namespace

double quadratic(In<float> e, In<double> h) {
  const Index n = e.rows(), k = e.cols(), nr = table().nr_f32;
  require_square("quadratic", k, h);
  require_finite("quadratic", "E", e);
  require_finite("quadratic", "H", h);
  const Half half(h, 0, k);
  Buffer<double> loss(ceil_div(n, nr) * nr, true);
  const Index panels = ceil_div(n, nr);
  parallel_for(ceil_div(panels, kPanelsPerTask), [&](Index task) {
    const Index first = task * kPanelsPerTask, count = std::min(kPanelsPerTask, panels - first);
    Buffer<float> error(count * k * nr);
    for (Index p = 0; p < count; ++p) load_panel(e, (first + p) * nr, 0, k, error + p * k * nr);
    half.quadratic(count, error.get(), loss + first * nr);
  });
  double sum = 0.0;
  for (Index row = 0; row < n; ++row) sum += loss[row];
  return sum;
}

void awq_scale(In<float> w, In<double> h, In<float> column_scales, const FitSettings& settings,
               OutVec<double> losses) {
  const Index n = w.rows(), k = w.cols(), nr = table().nr_f32, group = settings.group;
  require_square("awq_scale", k, h);
  require(column_scales.cols() == k && losses.size() == column_scales.rows(),
          "[awq_scale] column_scales must be A x ", k, " with A losses, got ", column_scales.rows(),
          " x ", column_scales.cols(), " and ", losses.size());
  require(group > 0, "[awq_scale] group must be positive, got ", group);
  require_finite("awq_scale", "column_scales", column_scales);
  for (Index i = 0; i < column_scales.size(); ++i)
    require(column_scales(i / k, i % k) > 0.0F, "[awq_scale] column_scales must be positive, got ",
            column_scales(i / k, i % k), " at (", i / k, ", ", i % k, ")");
  require_finite("awq_scale", "W", w);
  require_finite("awq_scale", "H", h);
  const Eigen::VectorXf none;
  const GridLevels levels(settings.grid);
  require(levels.get() == nullptr && !settings.grid.offset && settings.block == 0,
          "[awq_scale] the grid must be of integers with zero points and one level of scales");
  const FitOptions options = fit_options(settings, levels, none);
  const Half half(h, 0, k);
  const Index panels = ceil_div(n, nr), candidates = column_scales.rows();
  Buffer<double> loss(candidates * panels * nr, true);
  parallel_for(candidates * panels, [&](Index task) {
    const Index row = task % panels * nr;
    const float* column_scale = column_scales.data() + task / panels * column_scales.outerStride();
    Buffer<float> values(k * nr), error(k * nr), scale(nr), zero(nr);
    load_panel(w, row, 0, k, values.get());
    for (Index j = 0; j < k; ++j)
      for (Index lane = 0; lane < nr; ++lane) values[j * nr + lane] *= column_scale[j];
    for (Index first = 0; first < k; first += group) {
      const Index columns = std::min(group, k - first);
      table().fit_group(options, columns, values + first * nr, nullptr, scale.get(), zero.get());
      round_group(options.coding.max_code, columns, values + first * nr, column_scale + first,
                  scale.get(), zero.get(), error + first * nr);
    }
    half.quadratic(1, error.get(), loss + task * nr);
  });
  for (Index a = 0; a < candidates; ++a) {
    losses[a] = 0.0;
    for (Index i = 0; i < n; ++i) losses[a] += loss[a * panels * nr + i];
  }
}

void awq_clip(In<float> w, In<double> h, const FitSettings& settings, InVec<float> factors,
              Out<float> scales, Out<float> zeros) {
  const Index n = w.rows(), k = w.cols(), nr = table().nr_f32, group = settings.group;
  require_square("awq_clip", k, h);
  require_codes("awq_clip", n, k, group, scales, zeros);
  require_finite("awq_clip", "W", w);
  require_finite("awq_clip", "H", h);
  require_factors("awq_clip", factors);
  require(factors.size() > 0, "[awq_clip] factors must have at least 1 entry, got 0");
  const Eigen::VectorXf none;
  const GridLevels levels(settings.grid);
  require(levels.get() == nullptr && !settings.grid.offset && settings.block == 0,
          "[awq_clip] the grid must be of integers with zero points and one level of scales");
  const FitOptions plain = fit_options(settings, levels, none);
  for (Index g = 0; g < scales.cols(); ++g) {
    const Index first = g * group, columns = std::min(group, k - first);
    const Half half(h, first, columns);
    parallel_for(ceil_div(n, nr), [&](Index panel) {
      Buffer<float> values(columns * nr), error(columns * nr), scale(nr), zero(nr);
      Buffer<double> loss(nr), best(nr);
      std::fill(best.get(), best + nr, std::numeric_limits<double>::infinity());
      load_panel(w, panel * nr, first, columns, values.get());
      for (Index f = 0; f < factors.size(); ++f) {
        FitOptions options = plain;
        options.factor_count = 1;
        options.factors = factors.data() + f;
        table().fit_group(options, columns, values.get(), nullptr, scale.get(), zero.get());
        round_group(options.coding.max_code, columns, values.get(), nullptr, scale.get(),
                    zero.get(), error.get());
        std::fill(loss.get(), loss + nr, 0.0);
        half.quadratic(1, error.get(), loss.get());
        for (Index lane = 0; lane < std::min(nr, n - panel * nr); ++lane) {
          if (f > 0 && !(loss[lane] < best[lane])) continue;
          best[lane] = loss[lane];
          scales(panel * nr + lane, g) = scale[lane];
          zeros(panel * nr + lane, g) = zero[lane];
        }
      }
    });
  }
}

}  // namespace bitwright
