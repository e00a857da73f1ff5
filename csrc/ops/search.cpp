// The GPTQ sweep that chooses the scales and zero points of each group on its way
// (docs/solver.md 6.3). The group's share of the objective is known before it is committed: sum
// (R_kk (t_k - q_k))^2 over its columns with its own feedback. Every candidate is run through that;
// the first of the best is committed. A candidate is dropped once no lane can win with it: losses
// only grow.
#include <limits>
#include <vector>

#include "core/parallel.h"
#include "ops.h"
#include "ops/fit_options.h"
#include "ops/steps.h"
#include "ops/sweep.h"

namespace bitwright {

namespace {

// Where each group starts in the order; refused where its columns do not stand together.
std::vector<Index> group_starts(Index k, Index group, InVec<std::int32_t> order) {
  std::vector<Index> starts;
  for (Index at = 0; at < k;) {
    const Index g = order[at] / group, columns = std::min(group, k - g * group);
    for (Index p = at; p < at + columns; ++p)
      require(p < k && order[p] / group == g,
              "[gptq_search] order must keep the columns of each group together, got column ",
              order[std::min(p, k - 1)], " at ", std::min(p, k - 1), " among those of group ", g);
    starts.push_back(at);
    at += columns;
  }
  return starts;
}

struct Panel {
  const Table& kernels;
  SweepPanel sweep;
  PanelSteps steps;
  Buffer<float> e, u, low, high, scale, zero, best_scale, best_zero, best;
  std::vector<const float*> scales, zeros;

  Panel(In<float> w, In<float> r, InVec<std::int32_t> order, const FitSettings& settings,
        In<float> steps_in, Index row, Index widest, const Table& table)
      : kernels(table),
        sweep(w, r, order, row, widest, table),
        steps(steps_in, settings, row, table.nr_f32),
        e(widest * sweep.nr()),
        u(widest * sweep.nr()),
        low(sweep.nr()),
        high(sweep.nr()),
        scale(sweep.nr()),
        zero(sweep.nr()),
        best_scale(sweep.nr()),
        best_zero(sweep.nr()),
        best(sweep.nr()),
        scales(static_cast<std::size_t>(widest)),
        zeros(static_cast<std::size_t>(widest)) {}

  void use(const Buffer<float>& s, const Buffer<float>& z) {
    std::fill(scales.begin(), scales.end(), s.get());
    std::fill(zeros.begin(), zeros.end(), z.get());
  }

  // Range of the targets that the group would have without rounding.
  void find_range(const SweepBlock& block) {
    const Index nr = sweep.nr();
    sweep.run(block, scales.data(), zeros.data(), {}, true, e.get(), [] { return true; });
    for (Index i = 0; i < block.columns * nr; ++i) u[i] = sweep.w()[i] - e[i];
    kernels.span(block.columns, u.get(), low.get(), high.get());
  }

  void try_candidate(const SweepBlock& block, const FitOptions& options, Index i) {
    const Index nr = sweep.nr();
    kernels.candidate(options, low.get(), high.get(), i, scale.get(), zero.get());
    use(scale, zero);
    const float* loss = sweep.block_loss();
    sweep.run(block, scales.data(), zeros.data(), options.coding, false, e.get(), [&] {
      bool open = i == 0;
      for (Index lane = 0; lane < nr; ++lane) open |= loss[lane] < best[lane];
      return open;
    });
    for (Index lane = 0; lane < nr; ++lane) {
      if (i > 0 && !(loss[lane] < best[lane])) continue;
      best[lane] = loss[lane];
      best_scale[lane] = scale[lane];
      best_zero[lane] = zero[lane];
    }
  }
};

}  // namespace

void gptq_search(In<float> w, In<float> r, InVec<std::int32_t> order, const FitSettings& settings,
                 InVec<float> factors, In<float> steps, Out<float> scales, Out<float> zeros,
                 Out<std::uint8_t> codes, OutVec<double> loss) {
  const Index n = w.rows(), k = w.cols(), group = settings.group;
  require_codes("gptq_search", n, k, group, scales, zeros);
  require_sweep("gptq_search", w, r, order, settings.grid, codes, loss);
  require_factors("gptq_search", factors);
  require_steps("gptq_search", settings, n, scales.cols(), steps);
  require(factors.size() > 0, "[gptq_search] factors must have at least 1 entry, got 0");
  FitSettings searched = settings;
  searched.search = true;
  const GridLevels levels(searched.grid);
  const FitOptions options = fit_options(searched, levels, factors);
  const Index per_factor =
      options.symmetric ? (options.negative ? 2 : 1) : 2 * options.zero_span + 1;
  const Index candidates = factors.size() * per_factor;
  const Table& kernels = table_of(n, thread_count());
  const auto make = [&](Index row) {
    return Panel(w, r, order, settings, steps, row, std::min(group, k), kernels);
  };
  const auto step = [&](Panel& panel, const SweepBlock& block) {
    const Index g = order[block.first] / group;
    panel.use(panel.scale, panel.zero);
    panel.find_range(block);
    const FitOptions here = panel.steps.at(options, g);
    for (Index i = 0; i < candidates; ++i) panel.try_candidate(block, here, i);
    panel.use(panel.best_scale, panel.best_zero);
    panel.sweep.run(block, panel.scales.data(), panel.zeros.data(), options.coding, false,
                    panel.sweep.error(block.first), [] { return true; });
    panel.sweep.commit(block, codes);
    for (Index lane = 0; lane < panel.sweep.rows(); ++lane) {
      scales(panel.sweep.row() + lane, g) = panel.best_scale[lane];
      zeros(panel.sweep.row() + lane, g) = panel.best_zero[lane];
    }
  };
  const std::vector<SweepBlock> blocks = sweep_blocks(
      k, group_starts(k, group, order), [&](Index p, Index i) { return r(p, i); }, false, nullptr,
      kernels);
  sweep(n, kernels.nr_f32, blocks, loss, make, step);
}

}  // namespace bitwright
