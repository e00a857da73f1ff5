// Rounding on given scales, its inverse, and the choice of the scales.
#include <algorithm>
#include <cmath>

#include "core/parallel.h"
#include "ops.h"
#include "ops/fit_options.h"
#include "ops/panel.h"
#include "ops/steps.h"

namespace bitwright {

namespace {

constexpr Index kRowsPerTask = 16;

template <class F>
void each_group(Index rows, Index k, Index group, const F& f) {
  parallel_for(ceil_div(rows, kRowsPerTask), [&](Index task) {
    for (Index r = task * kRowsPerTask; r < std::min(rows, (task + 1) * kRowsPerTask); ++r)
      for (Index g = 0; g * group < k; ++g) f(r, g, g * group, std::min(k, (g + 1) * group));
  });
}

}  // namespace

void fit(In<float> w, InVec<float> weight, const FitSettings& settings, InVec<float> factors,
         In<float> steps, Out<float> scales, Out<float> zeros) {
  const Index n = w.rows(), k = w.cols(), nr = table().nr_f32;
  require_codes("fit", n, k, settings.group, scales, zeros);
  require(weight.size() == 0 || weight.size() == k, "[fit] weight must have ", k, " entries, got ",
          weight.size());
  require_finite("fit", "W", w);
  for (Index i = 0; i < weight.size(); ++i)
    require(weight[i] >= 0.0F, "[fit] weight must not be negative, got ", weight[i], " at ", i);
  require_factors("fit", factors);
  const GridLevels levels(settings.grid);
  const FitOptions options = fit_options(settings, levels, factors);
  const Index groups = scales.cols();
  require_steps("fit", settings, n, groups, steps);
  parallel_for(ceil_div(n, nr), [&](Index panel) {
    Buffer<float> values(settings.group * nr), scale(nr), zero(nr);
    PanelSteps panel_steps(steps, settings, panel * nr);
    for (Index g = 0; g < groups; ++g) {
      const Index first = g * settings.group, columns = std::min(settings.group, k - first);
      load_panel(w, panel * nr, first, columns, values.get());
      table().fit_group(panel_steps.at(options, g), columns, values.get(),
                        weight.size() == 0 ? nullptr : weight.data() + first, scale.get(),
                        zero.get());
      for (Index lane = 0; lane < std::min(nr, n - panel * nr); ++lane) {
        scales(panel * nr + lane, g) = scale[lane];
        zeros(panel * nr + lane, g) = zero[lane];
      }
    }
  });
}

void encode(In<float> w, In<float> scales, In<float> zeros, Index group, const Grid& grid,
            Out<std::uint8_t> codes) {
  require_codes("encode", w.rows(), w.cols(), group, scales, zeros);
  require_grid("encode", grid);
  require(codes.rows() == w.rows() && codes.cols() == w.cols(), "[encode] codes must be ", w.rows(),
          " x ", w.cols(), ", got ", codes.rows(), " x ", codes.cols());
  require_scales("encode", scales);
  const float top = static_cast<float>(max_code(grid));
  const auto& middles = grid.middles;
  each_group(w.rows(), w.cols(), group, [&](Index r, Index g, Index begin, Index end) {
    const float scale = scales(r, g), zero = zeros(r, g);
    const float offset = grid.offset ? zero : 0.0F, shift = grid.offset ? 0.0F : zero;
    const float* from = w.data() + r * w.outerStride();
    std::uint8_t* to = codes.data() + r * codes.outerStride();
    for (Index j = begin; j < end; ++j) {
      const float x = (from[j] + offset) / scale;
      require(!std::isnan(x), "[encode] W must not be NaN, got NaN at (", r, ", ", j, ")");
      const auto above = std::lower_bound(middles.begin(), middles.end(), x) - middles.begin();
      const float code = std::min(std::max(std::nearbyint(x) + shift, 0.0F), top);
      to[j] = static_cast<std::uint8_t>(middles.empty() ? code : static_cast<float>(above));
    }
  });
}

void decode(In<std::uint8_t> codes, In<float> scales, In<float> zeros, Index group,
            const Grid& grid, Out<float> w) {
  require_codes("decode", codes.rows(), codes.cols(), group, scales, zeros);
  require_grid("decode", grid);
  require(codes.rows() == w.rows() && codes.cols() == w.cols(), "[decode] W must be ", codes.rows(),
          " x ", codes.cols(), ", got ", w.rows(), " x ", w.cols());
  const std::size_t count = grid.levels.size();
  each_group(codes.rows(), codes.cols(), group, [&](Index r, Index g, Index begin, Index end) {
    const float scale = scales(r, g), zero = zeros(r, g);
    const float offset = grid.offset ? zero : 0.0F, shift = grid.offset ? 0.0F : zero;
    const std::uint8_t* from = codes.data() + r * codes.outerStride();
    float* to = w.data() + r * w.outerStride();
    for (Index j = begin; j < end; ++j) {
      require(count == 0 || from[j] < count, "[decode] codes must be below ", count, ", got ",
              int{from[j]}, " at (", r, ", ", j, ")");
      const float level = count == 0 ? static_cast<float>(from[j]) - shift : grid.levels[from[j]];
      to[j] = level * scale - offset;
    }
  });
}

}  // namespace bitwright
