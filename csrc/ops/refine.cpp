// Refinement after the sweep (docs/solver.md 7), a panel of rows at a time, columns in natural
// order. Kept for every column: level l = c - z (of offsets l = c) and g = (w - q) H_d, so that the
// gain of a step is known without a product. A block of columns (c) or a group (l) is revised by
// the kernel; its changes then go to the other columns of g as tiles. Every g_j is one chain over
// the steps in their order, so blocks, spans and panels that go together change no bit.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "core/parallel.h"
#include "ops.h"
#include "ops/fit_options.h"
#include "ops/panel.h"
#include "ops/steps.h"

namespace bitwright {

namespace {

constexpr Index kBlock = 24;         // a multiple of every mr
constexpr Index kSpan = 192;         // a multiple of kBlock
constexpr Index kPanelsPerTask = 2;  // at most, that share H as it comes from memory

class RefinePanel {
 public:
  RefinePanel(In<float> w, In<float> steps, In<float> scales, In<float> zeros,
              In<std::uint8_t> codes, const FitSettings& settings, const FitOptions& options,
              const LeftSlices& h, Index row)
      : kernels_(h.kernels()),
        nr_(kernels_.nr_f32),
        mr_(kernels_.mr_f32),
        k_(w.cols()),
        group_(settings.group),
        groups_(scales.cols()),
        block_(settings.block),
        widest_(std::min(std::max<Index>(block_, 1) * group_, k_)),
        rows_(std::min(nr_, w.rows() - row)),
        options_(options),
        steps_(steps, settings, row, nr_),
        row_(row),
        w_(w),
        h_(h),
        level_(k_ * nr_, true),
        g_(ceil_div(k_, mr_) * mr_ * nr_, true),
        d_(std::max(kBlock, widest_) * nr_),
        changes_(std::min(kSpan, k_) * nr_),
        scratch_((widest_ + 2 * mr_) * nr_),
        multiple_(block_ > 0 ? widest_ * nr_ : 0),
        minus_(std::min(group_, k_) * nr_),
        scale_(groups_ * nr_),
        zero_(groups_ * nr_, true),
        offset_(groups_ * nr_, true),
        active_(nr_, true),
        gain_(nr_),
        loss_(nr_, true) {
    for (std::vector<bool>& rows : resting_) rows.resize(static_cast<std::size_t>(nr_));
    for (Index lane = 0; lane < nr_; ++lane) {
      active_[lane] = lane < rows_ ? 1.0F : 0.0F;
      for (Index g = 0; g < groups_; ++g) {
        scale_[g * nr_ + lane] = lane < rows_ ? scales(row + lane, g) : 1.0F;
        (options.coding.offset ? offset_ : zero_)[g * nr_ + lane] =
            lane < rows_ ? zeros(row + lane, g) : 0.0F;
      }
      for (Index j = 0; j < k_ && lane < rows_; ++j)
        level_[j * nr_ + lane] = level_of(codes(row + lane, j), zero_[j / group_ * nr_ + lane]);
    }
    std::fill(minus_.get(), minus_ + std::min(group_, k_) * nr_, -1.0F);
    Buffer<float> e(k_ * nr_);
    errors(e.get());
    for (Index s = 0; s < h_.slices(); ++s) h_.add(s, 0, k_, e.get(), g_ + s * mr_ * nr_);
    remaining();
  }

  void begin() { std::fill(gain_.get(), gain_ + nr_, 0.0F); }

  // Coordinate descent over the columns of a span, whose own g follows.
  void descend(Index begin, Index end, const float* diagonal) {
    changed_ = {};
    for (Index first = begin; first < end; first += kBlock) {
      const Index known = Index(changed_.some.size()), next = std::min(first + kBlock, end);
      descend_block(first, next - first, diagonal);
      for (Index s = begin / mr_; s < ceil_div(end, mr_); ++s)
        if (s < first / mr_ || s >= ceil_div(next, mr_)) add(s, known);
    }
  }

  // Least squares: the scale of a group, its offset, the step of a block.
  void rescale(Index g) {
    const Index first = g * group_, columns = std::min(group_, k_ - first);
    const FitOptions here = steps_.at(options_, g);
    revise(first, columns, level_ + first * nr_, {here.grid, here.step, false}, scale_ + g * nr_);
  }
  void shift(Index g) {
    const Index first = g * group_, columns = std::min(group_, k_ - first);
    const FitOptions here = steps_.at(options_, g);
    revise(first, columns, minus_.get(), {here.grid, here.offset_step, true}, offset_ + g * nr_);
  }
  void rescale_block(Index b) { revise_step(b, scale_.get(), steps_.scale(b), false); }
  void shift_block(Index b) { revise_step(b, offset_.get(), steps_.offset(b), true); }

  // g += d H in slice s for the changes d of the last step.
  void follow(Index s) { add(s, 0); }

  // Losses after a pass. A row rests after a descent that, like its last rescale, gained little.
  void rest(bool scales, double tolerance) {
    for (Index lane = 0; lane < rows_; ++lane) {
      const double gain = static_cast<double>(gain_[lane]);
      resting_[scales ? 1 : 0][std::size_t(lane)] = gain <= tolerance * loss_[lane];
      loss_[lane] -= gain;
      if (!scales && resting_[0][std::size_t(lane)] && resting_[1][std::size_t(lane)])
        active_[lane] = 0.0F;
    }
  }
  bool active() const {
    return std::any_of(active_.get(), active_ + nr_, [](float lane) { return lane > 0.0F; });
  }

  void finish(Out<float> steps, Out<float> scales, Out<float> zeros, Out<std::uint8_t> codes,
              OutVec<double> loss) {
    remaining();
    for (Index lane = 0; lane < rows_; ++lane) {
      loss[row_ + lane] = loss_[lane];
      for (Index b = 0; b < steps.cols(); ++b) steps(row_ + lane, b) = steps_.scale(b)[lane];
      for (Index g = 0; g < groups_; ++g) {
        scales(row_ + lane, g) = scale_[g * nr_ + lane];
        if (options_.coding.offset) zeros(row_ + lane, g) = offset_[g * nr_ + lane];
      }
      for (Index j = 0; j < k_; ++j)
        codes(row_ + lane, j) = code_of(level_[j * nr_ + lane], zero_[j / group_ * nr_ + lane]);
    }
  }

 private:
  float level_of(std::uint8_t code, float zero) const {
    const Levels* levels = options_.coding.levels;
    return levels ? levels->values[code] : static_cast<float>(code) - zero;
  }

  std::uint8_t code_of(float level, float zero) const {
    const Levels* levels = options_.coding.levels;
    if (!levels) return static_cast<std::uint8_t>(level + zero);
    const float* first = levels->values;
    return static_cast<std::uint8_t>(std::lower_bound(first, first + levels->count, level) - first);
  }

  void errors(float* e) const {
    load_panel(w_, row_, 0, k_, e, nr_);
    for (Index j = 0; j < k_; ++j) {
      const float *scale = scale_ + j / group_ * nr_, *offset = offset_ + j / group_ * nr_;
      for (Index lane = 0; lane < nr_; ++lane)
        e[j * nr_ + lane] -= level_[j * nr_ + lane] * scale[lane] - offset[lane];
    }
  }

  struct Stored {
    ScaleGrid grid;
    const float* step;
    bool offset;
  };

  // Least squares over one factor per lane of `level` [columns][nr].
  void revise(Index first, Index columns, const float* level, const Stored& stored, float* factor) {
    const Index begin = first / mr_, end = ceil_div(first + columns, mr_);
    std::fill(scratch_.get(), scratch_ + (end - begin) * mr_ * nr_, 0.0F);
    for (Index s = begin; s < end; ++s)
      h_.add(s, first, first + columns, level, scratch_ + (s - begin) * mr_ * nr_);
    RescaleGroup r{};
    r.columns = columns;
    r.grid = stored.grid;
    r.step = stored.step;
    r.offset = stored.offset;
    r.level = level;
    r.g = g_ + first * nr_;
    r.hl = scratch_ + (first - begin * mr_) * nr_;
    r.active = active_.get();
    r.scale = factor;
    r.d = d_.get();
    r.gain = gain_.get();
    bool moved = false;
    kernels_.rescale(r, &moved);
    changed_ = {first, moved ? first + columns : first, {}};
  }

  // The step of a block's scales (or offsets), the multiples of it as they are.
  void revise_step(Index b, float* values, float* step, bool offset) {
    const Index begin = b * block_, end = std::min(groups_, begin + block_);
    const Index first = begin * group_, columns = std::min(k_, end * group_) - first;
    for (Index g = begin; g < end; ++g)
      for (Index lane = 0; lane < nr_; ++lane)
        values[g * nr_ + lane] = std::nearbyint(values[g * nr_ + lane] / step[lane]);
    for (Index j = 0; j < columns; ++j)
      for (Index lane = 0; lane < nr_; ++lane)
        multiple_[j * nr_ + lane] = (offset ? -1.0F : level_[(first + j) * nr_ + lane]) *
                                    values[(first + j) / group_ * nr_ + lane];
    revise(first, columns, multiple_.get(), {options_.step_grid, nullptr, false}, step);
    for (Index g = begin; g < end; ++g)
      for (Index lane = 0; lane < nr_; ++lane) values[g * nr_ + lane] *= step[lane];
  }

  // e H e^T of each row from the errors and g.
  void remaining() {
    Buffer<float> e(k_ * nr_);
    errors(e.get());
    std::fill(loss_.get(), loss_ + nr_, 0.0);
    for (Index i = 0; i < k_ * nr_; i += nr_)
      for (Index lane = 0; lane < nr_; ++lane)
        loss_[lane] += static_cast<double>(e[i + lane]) * static_cast<double>(g_[i + lane]);
    for (Index lane = 0; lane < nr_; ++lane) loss_[lane] = std::max(loss_[lane], 0.0);
  }

  void descend_block(Index first, Index columns, const float* diagonal) {
    const float *scale[kBlock], *zero[kBlock];
    for (Index p = 0; p < columns; ++p) {
      scale[p] = scale_ + (first + p) / group_ * nr_;
      zero[p] = zero_ + (first + p) / group_ * nr_;
    }
    DescentBlock b{};
    b.columns = columns;
    b.h = diagonal + first * kBlock;
    b.ldh = kBlock;
    b.scale = scale;
    b.zero = zero;
    b.coding = options_.coding;
    b.active = active_.get();
    b.level = level_ + first * nr_;
    b.g = g_ + first * nr_;
    b.d = d_.get();
    b.gain = gain_.get();
    bool moved[kBlock];
    kernels_.descend(b, moved);
    for (Index p = 0; p < columns; ++p) {
      if (!moved[p]) continue;
      std::copy_n(d_ + p * nr_, nr_, changes_ + Index(changed_.some.size()) * nr_);
      changed_.some.push_back(static_cast<std::int32_t>(first + p));
    }
  }

  // Columns that the last step changed: a range, whose changes are d, or some, whose are `changes`.
  struct Changed {
    Index first, end;
    std::vector<std::int32_t> some;
  };

  void add(Index s, Index known) {
    float* g = g_ + s * mr_ * nr_;
    const std::int32_t *some = changed_.some.data(), *end = some + changed_.some.size();
    h_.add(s, changed_.first, changed_.end, d_.get(), g);
    h_.add(s, some + known, end, changes_ + known * nr_, g);
  }

  const Table& kernels_;
  Index nr_, mr_, k_, group_, groups_, block_, widest_, rows_;
  FitOptions options_;
  PanelSteps steps_;
  Index row_;
  In<float> w_;
  const LeftSlices& h_;
  Buffer<float> level_, g_, d_, changes_, scratch_, multiple_, minus_, scale_, zero_, offset_,
      active_, gain_;
  Buffer<double> loss_;
  std::vector<bool> resting_[2];
  Changed changed_{};
};

// Panels that take their steps together: slice by slice, H comes from memory once for all of them.
class RefineTask {
 public:
  RefineTask(const LeftSlices& h, const float* diagonal) : h_(h), diagonal_(diagonal) {}

  void descend(const std::vector<RefinePanel*>& panels) const {
    const Index k = h_.rows(), mr = h_.mr();
    for (Index begin = 0; begin < k; begin += kSpan) {
      const Index end = std::min(k, begin + kSpan);
      each(panels, begin / mr, ceil_div(end, mr),
           [&](RefinePanel& panel) { panel.descend(begin, end, diagonal_); });
    }
  }

  // The scale of each group and its offset, then the steps of each block.
  void rescale(const std::vector<RefinePanel*>& panels, Index groups, Index blocks,
               bool offsets) const {
    for (Index g = 0; g < groups; ++g) {
      each(panels, 0, 0, [&](RefinePanel& panel) { panel.rescale(g); });
      if (offsets) each(panels, 0, 0, [&](RefinePanel& panel) { panel.shift(g); });
    }
    for (Index b = 0; b < blocks; ++b) {
      each(panels, 0, 0, [&](RefinePanel& panel) { panel.rescale_block(b); });
      if (offsets) each(panels, 0, 0, [&](RefinePanel& panel) { panel.shift_block(b); });
    }
  }

 private:
  // A step of each panel; then g of each follows, but in the slices [skip, resume).
  template <class Step>
  void each(const std::vector<RefinePanel*>& panels, Index skip, Index resume,
            const Step& step) const {
    for (RefinePanel* panel : panels) step(*panel);
    for (Index s = 0; s < h_.slices(); ++s)
      if (s < skip || s >= resume)
        for (RefinePanel* panel : panels) panel->follow(s);
  }

  const LeftSlices& h_;
  const float* diagonal_;
};

}  // namespace

void refine(In<float> w, In<double> h, InVec<std::uint8_t> dead, double damping,
            const FitSettings& settings, const std::string& pattern, double tolerance,
            Out<float> steps, Out<float> scales, Out<float> zeros, Out<std::uint8_t> codes,
            OutVec<double> loss) {
  const Index n = w.rows(), k = w.cols();
  require_square("refine", k, h);
  require_codes("refine", n, k, settings.group, scales, zeros);
  require_scales("refine", scales);
  require_steps("refine", settings, n, scales.cols(), steps);
  require_finite("refine", "W", w);
  require_finite("refine", "H", h);
  require(dead.size() == k, "[refine] dead must have ", k, " entries, got ", dead.size());
  require(loss.size() == n, "[refine] loss must have ", n, " entries, got ", loss.size());
  require(codes.rows() == n && codes.cols() == k, "[refine] codes must be ", n, " x ", k, ", got ",
          codes.rows(), " x ", codes.cols());
  require(damping >= 0.0 && std::isfinite(damping),
          "[refine] damping must be finite and at least 0, got ", damping);
  require(pattern.find_first_not_of("cl") == std::string::npos,
          "[refine] pattern must consist of c and l, got ", pattern);
  const Eigen::VectorXf none;
  const GridLevels levels(settings.grid);
  const FitOptions options = fit_options(settings, levels, none);
  for (Index i = 0; i < n; ++i)
    for (Index j = 0; j < k; ++j)
      require(codes(i, j) <= max_code(settings.grid), "[refine] codes must be at most ",
              max_code(settings.grid), ", got code ", int{codes(i, j)}, " at (", i, ", ", j, ")");
  const double alone = damping > 0.0 ? damping : 1.0;
  const auto damped = [&](Index i, Index j) {
    if (dead[i] || dead[j]) return static_cast<float>(i == j ? alone : 0.0);
    return static_cast<float>(h(i, j) + (i == j ? damping : 0.0));
  };
  for (Index i = 0; i < k; ++i)
    require(damped(i, i) > 0.0F, "[refine] H must have a positive diagonal, got ", damped(i, i),
            " at ", i);
  const Table& kernels = table_of(n, thread_count());
  const Index nr = kernels.nr_f32;
  const LeftSlices left(k, k, damped, false, nullptr, kernels);
  Buffer<float> diagonal(k * kBlock, true);  // of the blocks of a descent
  for (Index i = 0; i < k; ++i)
    for (Index j = i / kBlock * kBlock; j < std::min(k, (i / kBlock + 1) * kBlock); ++j)
      diagonal[i * kBlock + j % kBlock] = damped(i, j);
  const RefineTask task(left, diagonal.get());
  const Index each = panels_of_task(ceil_div(n, nr), kPanelsPerTask);
  parallel_for(ceil_div(n, nr * each), [&](Index number) {
    std::vector<RefinePanel> panels;
    const Index end = std::min(n, (number + 1) * nr * each);
    for (Index row = number * nr * each; row < end; row += nr)
      panels.emplace_back(w, steps, scales, zeros, codes, settings, options, left, row);
    for (const char pass : pattern) {
      std::vector<RefinePanel*> active;
      for (RefinePanel& panel : panels)
        if (panel.active()) active.push_back(&panel);
      for (RefinePanel* panel : active) panel->begin();
      if (pass == 'c')
        task.descend(active);
      else
        task.rescale(active, scales.cols(), steps.cols() / (options.coding.offset ? 2 : 1),
                     options.coding.offset);
      for (RefinePanel* panel : active) panel->rest(pass == 'l', tolerance);
    }
    for (RefinePanel& panel : panels) panel.finish(steps, scales, zeros, codes, loss);
  });
}

}  // namespace bitwright
