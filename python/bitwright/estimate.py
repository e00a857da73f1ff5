"""Seconds that a run will take: parts timed on this machine (trial.py), times how often they occur.

forward     torch's linear (n, k) in the forward's dtype, on the tokens of a call or as many as
            keep it short; v's twice, since it is computed again once it is solved. The rest of
            a block, norms, attention, activations, Python, by the model's own code; of each
            kind of layer. Where blocks run again for each group, what lies before the group
            again. v's inputs mixed, on one window, of a part of its queries
statistics  `StatsCollector.update` of one input, and of two streams, at the real k up to
            COLUMNS; beyond, H fits no cache anyway and k^2 is left
solve       the solver on some rows: what a factor, an H and a row cost; k up to SOLVED as it
            is, beyond a row and an H as k^2, a factor as k^3 (docs/solver.md 2): H of SOLVED
            columns fits no cache either (a row of 8192 and of 14336 was within 3 % of that);
            q and k in turns of as many rows as there are heads, without what a turn does once
read save write   bytes, at the rates of a file written, synced and read back: the checkpoint,
            once for its fingerprint, once for the blocks, once for the solve; finished linears,
            and hidden states after each block; the result, written, read back and compared
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import nn

from bitwright import ops, registry, trial
from bitwright.calib import attention
from bitwright.calib.stats import StatsCollector
from bitwright.job import Job
from bitwright.recipe import solver_of, solver_options
from bitwright.sizes import CHUNK, Sizes
from bitwright.spec import Group, Scheme, Target
from bitwright.transforms import awq

PRODUCTS = 1e10  # multiply-adds of one measured product
COLUMNS = 4096
SOLVED = 4096
ROUNDING = 40e-9  # seconds per weight and thread of plain rounding and what is around it


class Estimate:
    """Of one job. rerun: blocks run again for each group."""

    def __init__(self, job: Job, sizes: Sizes, rerun: bool) -> None:
        self.job, self.sizes, self.rerun = job, sizes, rerun
        self.dtype, self.device = job.skeleton.dtype, job.device
        self._linears: dict[tuple[int, int], float] = {}
        self._sums: dict[tuple[int, int, bool], float] = {}
        self._solves: dict[tuple[int, str, bool, bool], trial.Solved] = {}

    def seconds(self) -> dict[str, float]:
        """By phase, as clock.py names them."""
        if not self.sizes.tokens:
            weights = sum(math.prod(target.shape) for target in self.job.targets.values())
            return {"solve": weights * ROUNDING / self.job.threads, **self._io()}
        return {
            "forward": self._forward(),
            "statistics": self._statistics(),
            "solve": self._solve(),
            **self._io(),
        }

    # forward

    def _forward(self) -> float:
        sizes, job = self.sizes, self.job
        blocks = 0.0
        for i, count in self._kinds():
            calls = sizes.tokens / sizes.batch
            windows = sizes.batch // job.recipe.length
            shape = (windows, job.recipe.length, sizes.hidden)
            rows = {name: n for name, (n, _) in sizes.shapes.items()}
            reached, whole = trial.rest_of_block(job.skeleton, i, shape, rows)
            blocks += count * calls * self._passes(reached, whole)
        mixing = self._mixing() * job.skeleton.count if job.mix else 0.0
        return sizes.streams * (blocks + mixing * sizes.tokens / job.recipe.length)

    def _kinds(self) -> list[tuple[int, int]]:
        """A block of each kind of layer, and how many there are."""
        kinds = getattr(self.sizes.config, "layer_types", None) or []
        if len(kinds) != self.job.skeleton.count:
            return [(0, self.job.skeleton.count)]
        return [(kinds.index(kind), kinds.count(kind)) for kind in dict.fromkeys(kinds)]

    def _passes(self, reached: dict[str, float], whole: float) -> float:
        """Seconds of a call of one stream through one block, and with `rerun` up to each group."""
        ends, linears = 0.0, 0.0
        for group in self.job.arch.groups:
            mixed = self.sizes.mixed(group)
            if mixed or not group.inside_attention:
                ends += reached[group.linears[0].name] + linears
            cost = sum(self._linear(*self.sizes.shape(x.name)) for x in group.linears)
            twice = not self.rerun and (mixed or group.inside_attention)
            linears += self.sizes.batch * cost * (2 if twice else 1)
        return whole + linears + (ends if self.rerun else 0.0)

    def _linear(self, n: int, k: int) -> float:
        """Seconds per token."""
        if (n, k) not in self._linears:
            tokens = int(min(self.sizes.batch, max(128, PRODUCTS / (n * k) // 16 * 16)))
            x, W = (
                torch.ones(rows, k, dtype=self.dtype, device=self.device) for rows in (tokens, n)
            )
            with torch.inference_mode():
                spent = trial.typical(lambda: nn.functional.linear(x, W), self.device)
            self._linears[n, k] = spent / tokens
        return self._linears[n, k]

    def _mixing(self) -> float:
        """Seconds per window of one block."""
        config, length, every = self.sizes.config, self.job.recipe.length, self.job.mix
        heads = int(config.num_attention_heads)
        kv = int(getattr(config, "num_key_value_heads", None) or heads)
        width = int(getattr(config, "head_dim", None) or self.sizes.hidden // heads)
        work = heads * length / every * length * (width + self.sizes.hidden)
        fewer = max(1, min(math.ceil(work / PRODUCTS), length // every))
        like: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        query, key = (torch.randn(1, h, length, width, **like) for h in (heads, kv))
        x = torch.randn(1, length, self.sizes.hidden, **like)
        call = attention.Call(nn.Module(), query, key, key, None, {})
        with torch.inference_mode():
            mix = partial(attention.mix, call, x, every * fewer, kv)
            return fewer * trial.typical(mix, self.device)

    # sums

    def _statistics(self) -> float:
        total = 0.0
        for group in self.job.arch.groups:
            k, rows = self.sizes.columns(group), 1.0
            if self.sizes.mixed(group):
                rows = int(self.sizes.config.num_attention_heads) / self.job.mix
            elif group.inside_attention:
                continue
            n = self.sizes.shape(group.linears[0].name)[0] if self.sizes.added(group) else 0
            share = self.sizes.compared
            cost = (1.0 - share) * self._sum(k, 0, False)
            if share:
                cost += share * self._sum(k, n, True)
            total += rows * cost
            if self.sizes.mixed(group) and len(group.linears[0].roles) > 1:  # q, k apart
                total += (1.0 - share) * self._sum(k, 0, False)
                total += share * self._sum(k, 0, True) if share else 0.0
        return total * self.sizes.tokens * self.job.skeleton.count

    def _sum(self, k: int, n: int, compared: bool) -> float:
        """Seconds per token of the sums over k columns, of two streams, with D of n rows."""
        key = (k, n, compared)
        if key not in self._sums:
            columns = min(k, COLUMNS)
            larger = (k / columns) ** 2
            rows = min(n, COLUMNS)
            chunks = PRODUCTS / (columns**2 * (1 + 2 * compared) + 2 * rows * columns) / CHUNK
            tokens = int(min(self.sizes.batch, CHUNK * max(1, int(chunks))))
            x, before, *stream = (
                torch.randn(tokens, width).to(self.device, self.dtype)
                for width in (columns, columns, rows, rows)
            )
            sums = StatsCollector(columns, sums=self.job.sums_of(columns))
            given: tuple[Any, ...] = (x,)
            if compared:
                given = (x, before, tuple(stream) if rows else None)
            spent = trial.typical(lambda: sums.update(*given), self.device)
            self._sums[key] = larger * spent / tokens
        return self._sums[key]

    # solve

    def _solve(self) -> float:
        """Of all matrices; those of one input share its factor."""
        total = 0.0
        for group in self.job.arch.groups:
            for block in range(self.job.skeleton.count):
                wanted = self.job.wanted(block, group)
                costs = [self._solved(group, target) for target in wanted]
                matrices = self.sizes.matrices(group)
                total += matrices * max((cost.factor for cost in costs), default=0.0)
                total += sum(
                    matrices * cost.once + self._rows(block, target) * cost.row
                    for target, cost in zip(wanted, costs, strict=True)
                )
        return total

    def _rows(self, block: int, target: Target) -> int:
        """Rows of a matrix; where those of its heads are solved in turn, its share of the rows that
        would keep all threads as long: whole panels, as many on each."""
        rows, role = target.shape[0], ",".join(target.linear.roles)
        if role not in ("attn.q", "attn.k") or not solver_options(self.job.recipe).get("coupled"):
            return rows
        heads = self.job.heads(block)
        if heads is None or target.scheme is None:
            return rows
        count = {"attn.q": heads.queries, "attn.k": heads.keys}
        group = next(g for g in self.job.arch.groups if target.linear in g.linears)
        turn = sum(
            count.get(",".join(other.linear.roles), 0)
            for other in self.job.wanted(block, group)
            if other.scheme == target.scheme and (other == target or not target.scheme.of_whole)
        )
        lanes = int(ops.panel_rows(turn)) * self.job.threads
        busy = -(-turn // lanes) * lanes
        return -(-rows * busy // turn)

    def _solved(self, group: Group, target: Target) -> trial.Solved:
        k, scheme = target.shape[1], target.scheme
        if scheme is None:
            return trial.Solved(0.0, 0.0, 0.0)
        tried, larger = self._tried(min(k, SOLVED), scheme, group), max(1.0, k / SOLVED)
        once, row = larger**2 * tried.once, larger**2 * tried.row
        return trial.Solved(larger**3 * tried.factor, once, row)

    def _tried(self, k: int, scheme: Scheme, group: Group) -> trial.Solved:
        recipe, added = self.job.recipe, self.sizes.added(group)
        scaled = recipe.method.startswith("awq") and group.norm is not None
        key = (k, scheme.name, added, scaled)
        if key not in self._solves:
            solver = registry.get("solvers", solver_of(recipe.method))
            options = solver_options(recipe)
            if solver_of(recipe.method) == "gptq":
                options.setdefault("negative", self.job.format.NEGATIVE_SCALES)
            problem = trial.Problem(k, scheme, self.job.compare > 0, added)
            before = awq.plan if scaled else None
            self._solves[key] = trial.solving(solver, options, problem, before)
        return self._solves[key]

    # disk

    def _io(self) -> dict[str, float]:
        job, sizes = self.job, self.sizes
        write, read = trial.disk()
        inside = sum(
            job.checkpoint.entries[job.skeleton.sources[f"{t.name}.weight"]][2]
            for t in job.targets.values()
            if f"{t.name}.weight" in job.skeleton.sources
        )
        blocks = sizes.tokens > 0
        total, output, spooled = job.checkpoint.total_bytes, sizes.output(), sizes.spooled()
        hidden = sizes.stream * job.skeleton.count if blocks else 0
        look, turn = trial.checking()
        weights = sum(math.prod(t.shape) for t in job.targets.values() if t.scheme is not None)
        again = look * 2 * (total - inside) + turn * 3 * weights
        return {
            "read": read * (total + inside + (total if blocks else 0)),
            "save": write * (spooled + hidden) + turn * weights / 2,
            "write": write * output + read * (total - inside + 2 * output + 2 * spooled) + again,
        }
