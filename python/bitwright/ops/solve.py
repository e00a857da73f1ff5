"""The solver's verbs: factor, sweep, search, refinement, drift; and AWQ's searches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bitwright import _core
from bitwright.ops.arrays import (
    core_grid,
    fit_settings,
    matrix,
    parts,
    steps_in,
    vector,
    zeros_in,
    zeros_out,
)
from bitwright.ops.codes import block_steps, global_scale
from bitwright.spec import F32, F64, U8, InputError, NumericalError, QTensor, Scheme

FEEDBACK_FACTORS: F32 = np.array(
    [1.0, *(f / 1000 for f in range(1050, 449, -25) if f != 1000)], np.float32
)
TABLE_FACTORS: F32 = np.array([1.0, *np.geomspace(1.7, 0.5, 24)], np.float32)
POWER_FACTORS: F32 = np.array([1.0, 2.0, 0.5], np.float32)
CLIP_FACTORS: F32 = np.linspace(1.0, 0.5, 21, dtype=np.float32)
DAMPING_ATTEMPTS = 6
DAMPING_STEP = 1e-3  # the ladder of damping 0 goes on with ten times this


def factor(
    H: F64,
    damping: float = 0.01,
    order: Sequence[int] | npt.NDArray[np.int32] | None = None,
    dead: npt.NDArray[np.bool_] | None = None,
) -> tuple[F32, float, int]:
    """R float32 (k, k), upper triangular, with R R^T = H[order][:, order] + damping mean(diag H) I.

    The mean is over the columns not marked dead; those have nothing but the damping (1 without) on
    the diagonal. Where a pivot is not positive the damping climbs a ladder, ten times each step
    (from 0 to .01). Returns R, the relative damping that worked and the steps climbed;
    NumericalError after the last rung.
    """
    H = matrix("factor", H, np.float64)
    k = H.shape[0]
    wish = np.arange(k) if order is None else np.asarray(order)
    columns = wish.astype(np.int32, copy=False) if wish.dtype.kind in "iu" else wish
    columns = vector("factor", columns, np.int32)
    dead = np.zeros(k, np.bool_) if dead is None else vector("factor", dead, np.bool_)
    if H.shape != (k, k) or len(dead) != k or not 0 <= damping < math.inf:
        raise InputError(
            f"[factor] wanted H (k, k), dead (k) and damping >= 0, got {H.shape}, {dead.shape} and "
            f"{damping}"
        )
    mean = float(np.diagonal(H)[~dead].mean()) if not dead.all() else 1.0
    R = np.empty((k, k), np.float32)
    for rung in range(DAMPING_ATTEMPTS):
        tried = damping * 10.0**rung if damping or not rung else DAMPING_STEP * 10.0**rung
        if _core.factor(H, columns, dead.view(np.uint8), tried * mean, R):
            return R, tried, rung
    raise NumericalError(
        f"[factor] H ({k} x {k}) is not positive definite with relative damping {damping:g} to "
        f"{tried:g}"
    )


def gptq(
    W: F32,
    R: F32,
    order: npt.NDArray[np.int32],
    scales: F32,
    zeros: U8 | F32,
    scheme: Scheme,
    whole: float | None = None,
    steps: F32 | None = None,
) -> tuple[QTensor, F64]:
    """Rounds W (n, k) with error feedback on given scales; R and order as from `factor`.

    Returns the QTensor and the loss of each row (n,), e (H + damping) e^T.
    """
    W, R = matrix("gptq", W, np.float32), matrix("gptq", R, np.float32)
    scales, given = matrix("gptq", scales, np.float32), zeros_in("gptq", zeros, scheme)
    codes, loss = np.empty(W.shape, np.uint8), np.empty(W.shape[0], np.float64)
    group = scheme.columns(W.shape[1])
    _core.gptq(
        W, R, vector("gptq", order, np.int32), scales, given, group, core_grid(scheme), codes, loss
    )
    if steps is None:
        steps = block_steps(W, scheme)
    return QTensor(codes, scales, zeros, scheme, whole or global_scale(W, scheme), steps), loss


def feedback_factors(scheme: Scheme) -> F32:
    """Scales tried in a group, relative to the one that spans its range. Levels of tables lie far
    apart at the end: there the range may as well end at a level before the last (up to 1.7)."""
    if scheme.scale == "e8m0":
        return POWER_FACTORS
    return FEEDBACK_FACTORS if scheme.grid.uniform else TABLE_FACTORS


def gptq_search(
    W: F32,
    R: F32,
    order: npt.NDArray[np.int32],
    scheme: Scheme,
    *,
    factors: F32 | None = None,
    zero_span: int = 1,
    negative: bool = False,
    whole: float | None = None,
    steps: F32 | None = None,
) -> tuple[QTensor, F64]:
    """`gptq` with scales and zero points chosen inside the sweep (docs/solver.md 6.3).

    For each row and group the candidate with the least loss after the group's own feedback: scales
    factor times the one that spans the group's targets, as stored; zero points z0 - zero_span ..
    z0 + zero_span; negative: scales of either sign where the scheme is symmetric. `order` must keep
    groups together. factors: None for those of `feedback_factors`. whole: the global scale of
    "e4m3" scales (None: that of W). steps: of two-level scales (None: `block_steps` of W).
    """
    if factors is None:
        factors = feedback_factors(scheme)
    W, R = matrix("gptq_search", W, np.float32), matrix("gptq_search", R, np.float32)
    n, k = W.shape
    scales = np.empty((n, scheme.groups(k)), np.float32)
    zeros = np.empty(scales.shape, np.float32)
    codes, loss = np.empty(W.shape, np.uint8), np.empty(n, np.float64)
    if steps is None:
        steps = block_steps(W, scheme)
    whole = whole or global_scale(W, scheme)
    settings = fit_settings(
        scheme, k, True, zero_span=zero_span, negative=negative, global_scale=whole
    )
    columns = vector("gptq_search", order, np.int32)
    factors = vector("gptq_search", factors, np.float32)
    units = steps_in("gptq_search", steps, n)
    _core.gptq_search(W, R, columns, settings, factors, units, scales, zeros, codes, loss)
    return QTensor(codes, scales, zeros_out(zeros, scheme), scheme, whole, steps), loss


def refine(
    W: F32,
    H: F64,
    q: QTensor,
    damping: float,
    dead: npt.NDArray[np.bool_] | None = None,
    *,
    pattern: str = "ccclclc",
    tolerance: float = 1e-4,
) -> tuple[QTensor, F64]:
    """`q` with codes (c: coordinate descent) and scales (l: least squares; offsets and the steps of
    two-level scales with them) revised in the order of `pattern`; each step lowers e (H + damping
    I) e^T, of which what remains of each row (n,) is returned too. damping: absolute. A row rests
    after a c that, like its last l, gained no more than `tolerance` of its loss.
    """
    W, H = matrix("refine", W, np.float32), matrix("refine", H, np.float64)
    n, k = W.shape
    dead = np.zeros(k, np.bool_) if dead is None else vector("refine", dead, np.bool_)
    codes, scales, zeros, _ = parts("refine", q)
    codes, scales, zeros = codes.copy(), scales.copy(), zeros.copy()
    steps, loss = steps_in("refine", q.steps, n).copy(), np.empty(n, np.float64)
    settings = fit_settings(q.scheme, k, False, global_scale=q.global_scale)
    gone = dead.view(np.uint8)
    _core.refine(
        W, H, gone, damping, settings, pattern, tolerance, steps, scales, zeros, codes, loss
    )
    kept = steps if q.scheme.block else None
    return QTensor(codes, scales, zeros_out(zeros, q.scheme), q.scheme, q.global_scale, kept), loss


def drift(W: F32, C: F64, R: F32, order: npt.NDArray[np.int32], D: F64 | None = None) -> F32:
    """(W C + D) (R R^T)^-1 (n, k): what inputs that drifted by C = (X - X')^T X' / tokens ask of W
    (docs/solver.md 9), and a sum that W X' is added to, which changed by D = (S - S')^T X' / tokens
    (n, k). C (k, k) in natural order; R and order as from `factor`."""
    W, C = matrix("drift", W, np.float32), matrix("drift", C, np.float64)
    D = np.empty((0, 0)) if D is None else matrix("drift", D, np.float64)
    delta = np.empty(W.shape, np.float32)
    R, columns = matrix("drift", R, np.float32), vector("drift", order, np.int32)
    _core.drift(W, C, D, R, columns, delta)
    return delta


def awq_scale(W: F32, H: F64, column_scales: F32, scheme: Scheme) -> F64:
    """For each row s of column_scales (A, k): tr(E H E^T), E = W - round(W diag(s)) diag(1/s)."""
    W, H = matrix("awq_scale", W, np.float32), matrix("awq_scale", H, np.float64)
    column_scales = matrix("awq_scale", column_scales, np.float32)
    losses = np.empty(len(column_scales), np.float64)
    _core.awq_scale(W, H, column_scales, fit_settings(scheme, W.shape[1], False), losses)
    return losses


def awq_clip(W: F32, H: F64, scheme: Scheme, factors: F32 = CLIP_FACTORS) -> tuple[F32, U8 | F32]:
    """Scales and zeros (n, G) from the range of each group shrunk to the least e_g H_gg e_g^T."""
    W, H = matrix("awq_clip", W, np.float32), matrix("awq_clip", H, np.float64)
    settings = fit_settings(scheme, W.shape[1], False)
    scales = np.empty((W.shape[0], scheme.groups(W.shape[1])), np.float32)
    zeros = np.empty(scales.shape, np.float32)
    _core.awq_clip(W, H, settings, vector("awq_clip", factors, np.float32), scales, zeros)
    return scales, zeros_out(zeros, scheme)
