"""From a group's statistics to its finished linears: transform, solver, report, spool.

awq, awq+gptq: all linears behind one norm share column scales, chosen when the first of them is
reached; the norm is on disk before the linears that rely on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

from bitwright import ops, registry
from bitwright.hessian.heads import metrics
from bitwright.job import Job
from bitwright.recipe import solver_of, solver_options
from bitwright.solvers import rtn
from bitwright.spec import F32, F64, Group, InputError, QTensor, Report, Scheme, Stats, Target
from bitwright.spool import Finished, Spool
from bitwright.transforms import awq, fold

CLIP_SKIPS = (
    "attn.q",
    "attn.k",
)  # AWQ: rows that attention multiplies with each other keep their range
PARTNERS = {"attn.q": "attn.k", "attn.k": "attn.q"}


class BlockSolver:
    """Solves the groups of one block; `done` and `solve` are what calib.capture asks for. phase:
    entered with the name of what it is that takes time, where it is not solving."""

    def __init__(
        self,
        job: Job,
        spool: Spool,
        block: int,
        finished: Callable[[Target], None],
        phase: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.job, self.spool, self.block, self.finished = job, spool, block, finished
        self.phase = phase
        self._prepared: tuple[Stats | None, Scheme, Any] | None = None
        self._scaled: tuple[Stats, Stats] | None = None
        self._parts: list[tuple[QTensor, Report]] = []
        self._seconds = 0.0

    def done(self, group: Group) -> dict[str, F32] | None:
        """Weights of a group that needs no statistics: all of it is finished, or kept in float."""
        wanted = self.job.wanted(self.block, group)
        if not all(self.spool.has(target.name) for target in wanted):
            return None
        return {target.linear.name: self._load(target).dense() for target in wanted}

    def solve(self, group: Group, stats: Stats) -> dict[str, F32]:
        """Solves what is left of a group; the weights (n, k) that its linears now have."""
        if group.rows is not None:
            return self._solve_rows(group, group.rows, stats)
        wanted = self.job.wanted(self.block, group)
        scales, exponent = self._rescale(group, stats)
        weights: dict[str, F32] = {}
        for target in wanted:
            if target.linear.name in weights:
                continue
            if self.spool.has(target.name):
                weights[target.linear.name] = self._load(target).dense()
                continue
            together = self._together(group, target, stats)
            finished = self._finish(group, together, stats, scales, exponent)
            for one, done in zip(together, finished, strict=True):
                weights[one.linear.name] = done.dense()
        if not self._shared_with_next(group):
            self._prepared = self._scaled = None
        return weights

    def _solve_rows(self, group: Group, rows: tuple[int, int], stats: Stats) -> dict[str, F32]:
        """Solves some rows of a fused linear; with the last of them it is finished. Rows that are
        not solved yet stay as they are."""
        wanted = self.job.wanted(self.block, group)
        if not wanted:
            return {}
        target, begin = wanted[0], time.perf_counter()
        scales, exponent = self._rescale(group, stats)
        W = self.job.weight(target)
        self._parts.append(self._round(group, target, W, stats, scales, rows))
        self._prepared = self._scaled = None
        self._seconds += time.perf_counter() - begin
        q = ops.stacked([part for part, _ in self._parts])
        if rows[1] < len(W):
            solved = Finished(q, self._parts[0][1], scales).dense()
            return {target.linear.name: np.concatenate([solved, W[rows[1] :]])}
        report = replace(
            _of_rows([report for _, report in self._parts], target),
            awq=exponent,
            seconds=round(self._seconds, 4),
        )
        self._parts, self._seconds = [], 0.0
        done = Finished(q, report, scales)
        self._save(target, done)
        return {target.linear.name: done.dense()}

    def _shared_with_next(self, group: Group) -> bool:
        """Whether the next group (v) may have the same inputs: H and its factor are kept for it."""
        return not self.job.mix and self._before_v(group)

    def _before_v(self, group: Group) -> bool:
        groups = self.job.arch.groups
        at = groups.index(group) + 1
        return at < len(groups) and groups[at].inside_attention

    def solve_alone(self, target: Target) -> None:
        """Data-free rounding of one linear."""
        if not self.spool.has(target.name):
            self._finish(Group((target.linear,)), [target], None, None, None)

    def _save(self, target: Target, done: Finished) -> None:
        with self.phase("save"):
            self.spool.save(target.name, done)
        self.finished(target)

    def _load(self, target: Target) -> Finished:
        done = self.spool.load(target.name)
        if done is None:
            raise InputError(f"[work] wanted {target.name} in {self.spool.folder}, found none")
        return done

    def _finish(
        self,
        group: Group,
        targets: list[Target],
        stats: Stats | None,
        scales: F32 | None,
        exponent: float | None,
    ) -> list[Finished]:
        """One matrix, or those that are solved at once."""
        begin, first = time.perf_counter(), targets[0]
        solver, options = self._asked(first, stats)
        if first.scheme is not None:  # H is factored before W is there: less memory at a time
            self._prepare(solver, self._inner(group, stats, scales), first.scheme, options)
        matrices = [self.job.weight(target) for target in targets]
        if stats is not None and self._partner(group, first) is not None:
            rounded = self._round_in_turn(group, targets, matrices, stats, scales)
        else:
            rounded = [self._round(group, first, matrices[0], stats, scales)]
        each, finished = (time.perf_counter() - begin) / sum(map(len, matrices)), []
        for target, W, (q, told) in zip(targets, matrices, rounded, strict=True):
            seconds = round(each * len(W), 4)
            report = replace(told, name=target.name, awq=exponent, seconds=seconds)
            finished.append(Finished(q, report, scales))
            self._save(target, finished[-1])
        return finished

    def _round(
        self,
        group: Group,
        target: Target,
        W: F32,
        stats: Stats | None,
        scales: F32 | None,
        rows: tuple[int, int] | None = None,
    ) -> tuple[QTensor, Report]:
        scheme = _scheme_of(target)
        solver, options = self._asked(target, stats)
        inner = self._inner(group, stats, scales)
        scaled = W if scales is None else W * scales
        prepared = self._prepare(solver, inner, scheme, options)
        if solver_of(self.job.recipe.method) == "gptq":
            options["last"] = self._is_last(group, target)
        if rows is not None:
            options["whole"], scaled = scaled, np.ascontiguousarray(scaled[slice(*rows)])
        q, report = solver.solve(scaled, inner, scheme, prepared=prepared, **options)
        mine = W if rows is None else W[slice(*rows)]
        return q, self._told(report, mine, stats, scales, scheme)

    def _round_in_turn(
        self,
        group: Group,
        targets: list[Target],
        matrices: list[F32],
        stats: Stats,
        scales: F32 | None,
    ) -> list[tuple[QTensor, Report]]:
        """q and k, or one of them, under what attention multiplies their rows with."""
        scheme = _scheme_of(targets[0])
        solver, options = self._asked(targets[0], stats)
        inner = self._inner(group, stats, scales)
        scaled = matrices if scales is None else [W * scales for W in matrices]
        prepared = self._prepare(solver, inner, scheme, options)
        options["last"] = any(self._is_last(group, target) for target in targets)
        metrics = [self._metric(group, target, stats) for target in targets]
        rounded = solver.solve_in_turn(scaled, metrics, inner, scheme, prepared=prepared, **options)
        return [
            (q, self._told(report, W, stats, scales, scheme))
            for W, (q, report) in zip(matrices, rounded, strict=True)
        ]

    def _told(
        self, report: Report, W: F32, stats: Stats | None, scales: F32 | None, scheme: Scheme
    ) -> Report:
        """A solver's report in terms of the method and of W as it was."""
        if scales is not None and stats is not None:
            report = replace(report, error_rtn=rtn.solve(W, stats, scheme)[1].error)
        return report if report.fallback else replace(report, method=self.job.recipe.method)

    def _together(self, group: Group, target: Target, stats: Stats) -> list[Target]:
        """The matrices that are solved at once: q and k where both are left, in one scheme."""
        if stats.H is None or self._partner(group, target) is None:
            return [target]
        return [
            other
            for other in self.job.wanted(self.block, group)
            if other.scheme == target.scheme
            and self._partner(group, other) is not None
            and not self.spool.has(other.name)
        ]

    def _partner(self, group: Group, target: Target) -> Target | None:
        """Whose outputs attention multiplies those of q or k with, where their rows are coupled."""
        role = target.linear.roles[0] if len(target.linear.roles) == 1 else ""
        found = [x for x in group.linears if x.roles == (PARTNERS.get(role),)]
        coupled = solver_options(self.job.recipe).get("coupled")
        if not coupled or len(found) != 1 or self.job.heads(self.block) is None:
            return None
        return self.job.target(self.block, found[0])

    def _metric(self, group: Group, target: Target, stats: Stats) -> F64:
        """What attention multiplies the rows of q and k with, (heads, d, d)."""
        heads, partner = self.job.heads(self.block), self._partner(group, target)
        if heads is None or partner is None or stats.H is None:
            raise InputError(f"[solve] wanted the heads of {target.name}, got none")
        return metrics(heads, target.linear.roles[0], self.job.weight(partner), stats.H)

    def _asked(self, target: Target, stats: Stats | None) -> tuple[Any, dict[str, Any]]:
        """The solver and its options for a target."""
        method, options = self.job.recipe.method, solver_options(self.job.recipe)
        if solver_of(method) == "rtn":
            plain = stats is None or not set(CLIP_SKIPS).isdisjoint(target.linear.roles)
            options.setdefault("scales", "minmax" if plain else "clip")
        else:
            options.setdefault("negative", self.job.format.NEGATIVE_SCALES)
        return registry.get("solvers", solver_of(method)), options

    def _is_last(self, group: Group, target: Target) -> bool:
        """Whether no other matrix will ask for the statistics that this one has."""
        if group.rows is not None:
            return group.inside_attention
        last = self.job.wanted(self.block, group)[-1]
        return target.name == last.name and not self._before_v(group)

    def _inner(self, group: Group, stats: Stats | None, scales: F32 | None) -> Stats | None:
        """The statistics that the solver sees: those of the inputs behind the rescaled norm."""
        if stats is None or scales is None or group.norm is None:
            return stats
        if self._scaled is None or self._scaled[0] is not stats:
            self._scaled = (stats, fold.scale_stats(stats, scales))
        return self._scaled[1]

    def _prepare(
        self, solver: Any, stats: Stats | None, scheme: Scheme, options: dict[str, Any]
    ) -> Any:
        """What all matrices with these inputs share, computed once."""
        known = self._prepared
        if known is None or known[0] is not stats or known[1] != scheme:
            self._prepared = known = (stats, scheme, solver.prepare(stats, scheme, **options))
        return known[2]

    def _rescale(self, group: Group, stats: Stats) -> tuple[F32 | None, float | None]:
        """The exact column scales of the group's norm and their exponent, or None twice."""
        if not self.job.recipe.method.startswith("awq") or group.norm is None:
            return None, None
        name = f"{self.job.skeleton.path(self.block)}.{group.norm}"
        known = self.spool.norm(name)
        if known is None:
            known = self._plan_norm(name, group.norm, stats)
            if known is None:
                return None, None
        return known[0]["scales"], known[1]

    def _plan_norm(self, name: str, norm: str, stats: Stats) -> tuple[dict[str, Any], float] | None:
        readers = [
            self.job.target(self.block, linear)
            for group in self.job.arch.groups
            if group.norm == norm
            for linear in group.linears
        ]
        schemes = [target.scheme for target in readers]
        if None in schemes or schemes[0] is None:
            return None  # a reader that stays in float could not take the scales
        plan = awq.plan([self.job.weight(target) for target in readers], stats, schemes[0])
        has_bias = f"{name}.bias" in self.job.skeleton.sources
        gain = self.job.read(name)
        bias = self.job.read(name, "bias") if has_bias else None
        gain, bias, exact = fold.fold(gain, bias, plan.scales, self.job.arch.norm)
        arrays = {"gain": gain, "scales": exact} | ({} if bias is None else {"bias": bias})
        self.spool.save_norm(name, arrays, plan.exponent)
        return arrays, plan.exponent


def _scheme_of(target: Target) -> Scheme:
    if target.scheme is None:
        raise InputError(f"[solve] wanted a scheme for {target.name}, got none")
    return target.scheme


def _of_rows(parts: list[Report], target: Target) -> Report:
    """One report for the parts of a fused linear: errors are means over the rows, the rest is the
    last part's."""
    weights = [part.shape[0] for part in parts]
    last = parts[-1]

    def mean(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if None in values else float(np.average(values, weights=weights))

    return replace(
        last,
        name=target.name,
        shape=target.shape,
        error_rtn=mean("error_rtn"),
        error=mean("error"),
        error_swept=mean("error_swept"),
        rung=max(part.rung for part in parts),
        damping=max(part.damping for part in parts),
        fallback=next((part.fallback for part in parts if part.fallback), ""),
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )
