"""GPTQ (2210.17323), inverse-free: error feedback through the factor of H instead of its inverse.

Objective per row: (w - q) H (w - q)^T over q on the grid. With H + damping = R R^T, R upper
triangular, it is sum_k (R_kk (t_k - q_k))^2 with the targets

    t_k = w_k + (1 / R_kk) sum_{j<k} e_j R_jk,    e_j = w_j - q_j,

so rounding t_k in order is the reference recursion with one Cholesky instead of Cholesky, inverse
and Cholesky. Order "gar": columns sorted by diag H inside their group, groups by their largest,
both descending; groups stay whole, so no g_idx is stored. Scales are chosen before the sweep:
"hessian" minimises sum_j H_jj (w_j - q_j)^2 per group over 26 shrunk ranges, "mse" the reference's
|.|^2.4, "minmax" takes the range. Damping is relative to mean diag H: .01 at 4 bits and more, .02
at 3, .05 below (measured); where H is not positive definite it climbs a ladder, and after the last
rung the result is plain rounding on "hessian" scales, named as fallback. Dead columns (diag H = 0)
are rounded plainly. Limits: scales are static, codes are not revised after the sweep.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitwright import ops
from bitwright.spec import F32, F64, U8, InputError, NumericalError, QTensor, Report, Scheme, Stats

NEEDS_H = True
DAMPING = {1: 0.05, 2: 0.05, 3: 0.02}  # by bits, else DEFAULT_DAMPING
DEFAULT_DAMPING = 0.01
DEAD = 1e-12  # diagonal, relative to its largest entry, below which a column carries no signal


@dataclass(frozen=True, eq=False)
class Prepared:
    """Factor of the ordered H; R None: no rung of the damping ladder worked, `failure` says so."""

    R: F32 | None
    order: npt.NDArray[np.int32]
    dead: npt.NDArray[np.bool_]
    damping: float
    rung: int
    failure: str = ""


def column_order(diagonal: F64, group: int, order: str) -> npt.NDArray[np.int32]:
    """Columns in solving order: "gar" (see above), "act" (descending diagonal), "natural"."""
    k = len(diagonal)
    if order == "natural":
        return np.arange(k, dtype=np.int32)
    if order == "act":
        return np.argsort(-diagonal, kind="stable").astype(np.int32)
    if order != "gar":
        raise InputError(f"[gptq] order must be gar, act or natural, got {order!r}")
    groups = [np.arange(first, min(first + group, k)) for first in range(0, k, group)]
    peaks = np.array([diagonal[columns].max() for columns in groups])
    inside = [columns[np.argsort(-diagonal[columns], kind="stable")] for columns in groups]
    ranked = [inside[g] for g in np.argsort(-peaks, kind="stable")]
    return np.concatenate(ranked).astype(np.int32)


def _hessian(stats: Stats | None) -> F64:
    if stats is None or stats.H is None:
        raise InputError("[gptq] wanted Stats with H, got none: GPTQ needs calibration inputs")
    return stats.H


def prepare(
    stats: Stats | None,
    scheme: Scheme,
    *,
    damping: float | None = None,
    order: str = "gar",
    scales: str = "hessian",  # noqa: ARG001
) -> Prepared:
    """Order and factor for all matrices with these inputs and this group size."""
    H = _hessian(stats)
    diagonal = np.ascontiguousarray(np.diagonal(H))
    dead = diagonal <= DEAD * diagonal.max(initial=0.0)
    columns = column_order(diagonal, scheme.columns(len(H)), order)
    damping = DAMPING.get(scheme.bits, DEFAULT_DAMPING) if damping is None else damping
    try:
        R, used, rung = ops.factor(H, damping, columns, dead)
    except NumericalError as error:
        return Prepared(None, columns, dead, damping, ops.DAMPING_ATTEMPTS, str(error))
    return Prepared(R, columns, dead, used, rung)


def _scales(W: F32, H: F64, scheme: Scheme, scales: str) -> tuple[F32, U8]:
    if scales == "hessian":
        weight = np.maximum(np.diagonal(H), 0.0).astype(np.float32)
        return ops.fit(W, scheme, weight, search=True)
    if scales == "mse":
        return ops.fit(W, scheme, search=True, power=2.4)
    if scales == "minmax":
        return ops.fit(W, scheme)
    raise InputError(f"[gptq] scales must be hessian, mse or minmax, got {scales!r}")


def _error(W: F32, q: QTensor, size: float, loss: float, damping: float) -> float:
    """Relative output error from the sweep's own loss, less what the damping added to it."""
    E = W - ops.decode(q)
    added = damping * ops.energy(E)
    return max(loss - added, 0.0) / size if size > 0 else 0.0


def solve(
    W: F32,
    stats: Stats | None,
    scheme: Scheme,
    *,
    prepared: Prepared | None = None,
    damping: float | None = None,
    order: str = "gar",
    scales: str = "hessian",
) -> tuple[QTensor, Report]:
    """W float32 (n, k) rounded with error feedback under stats.H (k, k)."""
    H = _hessian(stats)
    p = prepared or prepare(stats, scheme, damping=damping, order=order)
    grid = _scales(W, H, scheme, scales)
    size = ops.quadratic(W, H)
    plain = ops.encode(W, *ops.fit(W, scheme), scheme)
    tokens = 0 if stats is None else stats.tokens
    if p.R is None:
        q = ops.encode(W, *grid, scheme)
        error = ops.relative_error(W, q, H, size)
    else:
        q, loss = ops.gptq(W, p.R, p.order, *grid, scheme)
        live = np.diagonal(H)[~p.dead]
        mean = float(live.mean()) if live.size else 1.0
        error = (
            ops.relative_error(W, q, H, size)
            if p.dead.any()
            else _error(W, q, size, float(loss.sum()), p.damping * mean)
        )
    notes = (
        (f"{tokens} tokens for {len(H)} columns: H is under-determined",) if tokens < len(H) else ()
    )
    report = Report(
        name="",
        shape=q.shape,
        scheme=scheme.name,
        method="gptq" if p.R is not None else "rtn",
        bits_per_weight=scheme.bits_per_weight(*q.shape),
        error_rtn=ops.relative_error(W, plain, H, size),
        error=error,
        tokens=tokens,
        damping=p.damping,
        rung=p.rung,
        dead=int(p.dead.sum()),
        fallback=f"plain rounding on hessian scales: {p.failure}" if p.failure else "",
        notes=notes,
    )
    return q, report
