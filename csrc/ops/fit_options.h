// FitSettings, the caller's words, as the FitOptions that the kernel reads.
#pragma once

#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "kernels/types.h"
#include "ops.h"

namespace bitwright {

inline void require_factors(const char* op, InVec<float> factors) {
  for (Index i = 0; i < factors.size(); ++i)
    require(factors[i] > 0.0F && factors[i] <= 1e4F, "[", op,
            "] factors must be positive and at most 1e4, got ", factors[i], " at ", i);
}

// Largest and smallest scale: the values of the scale grid that are normal numbers in every format
// that the grid promises ("bf16": exact in fp16 too, hence fp16's normal range).
inline ScaleGrid scale_grid(const std::string& name, float global) {
  require(global > 0.0F && global <= 0x1p100F && global >= 0x1p-100F,
          "[fit] global_scale must be positive and finite, got ", global);
  require(global == 1.0F || name == "e4m3", "[fit] global_scale must be 1 for ", name,
          " scales, got ", global);
  if (name == "bf16") return {16, 0x1p-14F, 65280.0F, 1.0F, 0.0F, 0};
  if (name == "fp16") return {13, 0x1p-14F, 65504.0F, 1.0F, 0.0F, 0};
  if (name == "e8m0") return {23, 0x1p-126F, 0x1p126F, 1.0F, 0.0F, 0};
  if (name == "e4m3") return {20, 0x1p-6F, 448.0F, global, 0.0F, 0};
  require(name == "fp32", "[fit] scale_grid must be bf16, fp16, fp32, e8m0 or e4m3, got ", name);
  return {0, 0x1p-126F, 0x1p126F, 1.0F, 0.0F, 0};
}

// Where the steps of two-level scales live: all positive numbers of the type.
inline ScaleGrid step_grid(const std::string& name) {
  require(name == "bf16" || name == "fp16", "[fit] two-level scales want bf16 or fp16, got ", name);
  if (name == "fp16") return {13, 0x1p-24F, 65504.0F, 1.0F, 0x1p-24F, 0};
  return {16, 0x1p-126F, 0x1p126F, 1.0F, 0.0F, 0};
}

inline void require_grid(const char* op, const Grid& grid) {
  require(grid.bits >= 1 && grid.bits <= 8, "[", op, "] bits must be 1 to 8, got ", grid.bits);
  const std::size_t count = grid.levels.size();
  if (count == 0) return;
  require(!grid.offset, "[", op, "] tables have no offsets");
  require(count >= 2 && count <= std::size_t{1} << grid.bits && grid.middles.size() == count - 1,
          "[", op, "] levels must be 2 to ", 1 << grid.bits,
          " with a middle between each two, got ", count, " and ", grid.middles.size());
  for (std::size_t i = 0; i + 1 < count; ++i)
    require(grid.levels[i] <= grid.middles[i] && grid.middles[i] < grid.levels[i + 1], "[", op,
            "] levels and middles must ascend in turn, got ", grid.levels[i], ", ", grid.middles[i],
            ", ", grid.levels[i + 1]);
  require(grid.levels.front() < 0.0F && grid.levels.back() > 0.0F, "[", op,
          "] levels must have both signs, got ", grid.levels.front(), " to ", grid.levels.back());
}

// The grid as kernels read it, null for integers; it lives as long as `grid` and the result.
class GridLevels {
 public:
  explicit GridLevels(const Grid& grid)
      : levels_{static_cast<int>(grid.levels.size()), grid.levels.data(), grid.middles.data()} {}
  const Levels* get() const { return levels_.count == 0 ? nullptr : &levels_; }

 private:
  Levels levels_;
};

inline int max_code(const Grid& grid) {
  return grid.levels.empty() ? (1 << grid.bits) - 1 : static_cast<int>(grid.levels.size()) - 1;
}

inline Coding coding_of(const Grid& grid, const GridLevels& levels) {
  return {levels.get(), static_cast<float>(max_code(grid)), grid.offset};
}

inline FitOptions fit_options(const FitSettings& s, const GridLevels& levels,
                              InVec<float> factors) {
  require_grid("fit", s.grid);
  require(s.symmetric || levels.get() == nullptr, "[fit] table grids must be symmetric");
  require(!s.symmetric || !s.grid.offset, "[fit] symmetric grids have no offsets");
  require(s.zero_min >= 0 && s.zero_min < (1 << s.grid.bits), "[fit] zero_min must be below ",
          1 << s.grid.bits, ", got ", s.zero_min);
  require(s.power == 2.0 || s.power == 2.4, "[fit] power must be 2 or 2.4, got ", s.power);
  require(s.zero_span >= 0 && s.zero_span <= 8, "[fit] zero_span must be 0 to 8, got ",
          s.zero_span);
  FitOptions o{};
  const float half = static_cast<float>(1 << (s.grid.bits - 1));
  o.coding = coding_of(s.grid, levels);
  o.above = levels.get() ? s.grid.levels.back() : std::max(half - 1.0F, 1.0F);
  o.below = levels.get() ? -s.grid.levels.front() : half;
  o.middle = levels.get() ? 0.0F : half;
  o.symmetric = s.symmetric;
  o.search_range = s.search;
  o.power_2_4 = s.power == 2.4;
  o.zero_min = static_cast<float>(s.zero_min);
  o.zero_span = s.search ? s.zero_span : 0;
  o.negative = s.search && s.negative;
  o.grid = scale_grid(s.scale_grid, s.global_scale);
  if (s.block > 0) {
    o.grid.most = (1 << (s.symmetric ? s.scale_bits - 1 : s.scale_bits)) - 1;
    o.step_grid = step_grid(s.scale_grid);
  }
  if (s.scale_grid == "e8m0" && levels.get()) {  // OCP MX: 2^floor(log2(max)) / 2^floor(log2(end))
    o.above = std::exp2(std::floor(std::log2(o.above)));
    o.below = std::exp2(std::floor(std::log2(o.below)));
  }
  o.factor_count = s.search ? factors.size() : 0;
  o.factors = factors.data();
  return o;
}

}  // namespace bitwright
