"""GPTQ on rows with one H: scales, sweep, refinement, and the error that is left; what the options
mean stands in solvers/gptq.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bitwright import ops
from bitwright.hessian import heads
from bitwright.hessian.factored import Factored
from bitwright.hessian.target import Drifts, target_of
from bitwright.spec import F32, F64, U8, QTensor, Scheme

ZERO_SPAN = {1: 2, 2: 2}  # zero points tried beside z0, by bits, else 1


@dataclass(frozen=True)
class Options:
    """What `solve` was asked for."""

    order: str
    scales: str
    refine: str
    alpha: float | None  # None: chosen on held-out tokens
    negative: bool
    whole: F32  # the matrix whose range sets the scale of a tensor scheme
    errors: bool


@dataclass(frozen=True, eq=False)
class Part:
    """A solved block of rows; sizes are tr(. H .^T). swept: None where rows were solved in turn."""

    q: QTensor
    swept: float | None
    final: float
    alpha: float | None
    size: float
    plain: float


def _steps(W: F32, H: F64, scheme: Scheme) -> F32 | None:
    """Of two-level scales: for the largest of the block that the "hessian" scales want."""
    return ops.block_steps(W, scheme, _weight(H), search=True)


def _weight(H: F64) -> F32:
    return np.maximum(np.diagonal(H), 0.0).astype(np.float32)


def _static_scales(
    W: F32, H: F64, scheme: Scheme, o: Options, steps: F32 | None
) -> tuple[F32, U8 | F32]:
    scales = o.scales
    whole = ops.global_scale(o.whole, scheme)
    if scheme.group == -1:
        all_scales, all_zeros = ops.fit(o.whole, scheme)
        return all_scales[: len(W)], all_zeros[: len(W)]
    if scales in ("hessian", "feedback"):
        return ops.fit(W, scheme, _weight(H), search=True, whole=whole, steps=steps)
    if scales == "mse":
        return ops.fit(W, scheme, search=True, power=2.4, whole=whole, steps=steps)
    return ops.fit(W, scheme, whole=whole, steps=steps)


def _sweep(W: F32, H: F64, p: Factored, scheme: Scheme, o: Options) -> tuple[QTensor, F64]:
    whole, steps = ops.global_scale(o.whole, scheme), _steps(W, H, scheme)
    if o.scales == "feedback" and o.order != "act" and scheme.group != -1:
        span = ZERO_SPAN.get(scheme.bits, 1)
        negative = o.negative and scheme.symmetric and scheme.scale in ("bf16", "fp16", "fp32")
        return ops.gptq_search(
            W,
            p.factor,
            p.order,
            scheme,
            zero_span=span,
            negative=negative,
            whole=whole,
            steps=steps,
        )
    static = _static_scales(W, H, scheme, o, steps)
    return ops.gptq(W, p.factor, p.order, *static, scheme, whole, steps)


def _error(W: F32, q: QTensor, loss: F64, p: Factored, H: F64, o: Options) -> float:
    """tr(E H E^T) from the loss under H + damping, less what the damping added to it; NaN, as all
    errors, where they are not asked for."""
    if not o.errors:
        return math.nan
    E = W - ops.decode(q)
    if p.dead.any():
        return ops.quadratic(E, H)
    return max(float(loss.sum()) - p.added * ops.energy(E), 0.0)


def solve_rows(
    W: F32, H: F64, drifts: list[Drifts | None], p: Factored, scheme: Scheme, o: Options
) -> Part:
    """The next block of rows; its drift is taken off `drifts`, so that it is gone with the
    target."""
    drift = drifts.pop(0)
    if p.R is None:
        return _unfactored(W, H, scheme, o)
    target, alpha = (W, None) if drift is None else target_of(W, drift, p, o.alpha)
    drift = None
    q, swept, final = _rounded(target, H, p, scheme, o)
    del target
    return Part(q, swept, final, alpha, *_compared_with(W, H, scheme, o))


def solve_in_turn(
    matrices: Sequence[F32],
    metrics: Sequence[F64],
    H: F64,
    drifts: list[Drifts | None],
    p: Factored,
    scheme: Scheme,
    o: Options,
) -> list[Part]:
    """Matrices of heads, metrics (heads, d, d) for each; a turn takes a row of every head of them
    all, since those of one matrix leave most lanes of a panel empty. Their drift is taken off
    `drifts`."""
    drift = drifts.pop(0)
    if p.R is None:
        return [_unfactored(W, H, scheme, replace(o, whole=W)) for W in matrices]
    ends = np.cumsum([len(W) for W in matrices]).tolist()
    places = [slice(end - len(W), end) for W, end in zip(matrices, ends, strict=True)]
    alphas: list[float | None] = [None] * len(matrices)
    targets = np.concatenate(matrices)
    if drift is not None:
        for i, (W, place) in enumerate(zip(matrices, places, strict=True)):
            targets[place], alphas[i] = target_of(W, drift, p, o.alpha)
    drift = None
    M, quiet = np.concatenate(metrics), replace(o, errors=False)
    q = heads.coupled(targets, M, lambda rows: _rounded(rows, H, p, scheme, quiet)[0])
    parts = []
    for W, alpha, place in zip(matrices, alphas, places, strict=True):
        mine = ops.rows_of(q, place)
        final = _form(targets[place] - ops.decode(mine), H, o)
        parts.append(Part(mine, None, final, alpha, *_compared_with(W, H, scheme, o)))
    return parts


def _unfactored(W: F32, H: F64, scheme: Scheme, o: Options) -> Part:
    """Plain rounding on "hessian" scales."""
    steps = _steps(W, H, scheme)
    static = _static_scales(W, H, scheme, replace(o, scales="hessian"), steps)
    q = ops.encode(W, *static, scheme, ops.global_scale(o.whole, scheme), steps)
    rounded = _form(W - ops.decode(q), H, o)
    return Part(q, rounded, rounded, None, *_compared_with(W, H, scheme, o))


def _form(E: F32, H: F64, o: Options) -> float:
    return ops.quadratic(E, H) if o.errors else math.nan


def _compared_with(W: F32, H: F64, scheme: Scheme, o: Options) -> tuple[float, float]:
    """tr(W H W^T), and what plain rounding would have cost."""
    if not o.errors:
        return math.nan, math.nan
    rounded = ops.encode(W, *ops.fit(W, scheme), scheme)
    return ops.quadratic(W, H), ops.quadratic(W - ops.decode(rounded), H)


def _rounded(
    target: F32, H: F64, p: Factored, scheme: Scheme, o: Options
) -> tuple[QTensor, float, float]:
    """Rows swept and refined; their error after each."""
    q, loss = _sweep(target, H, p, scheme, o)
    swept = final = _error(target, q, loss, p, H, o)
    pattern = o.refine.replace("l", "") if scheme.group == -1 else o.refine
    if pattern:
        q, loss = ops.refine(target, H, q, p.added, p.dead, pattern=pattern)
        final = _error(target, q, loss, p, H, o)
    return q, swept, final
