"""The target that GPTQ rounds: W and a share of what drifted inputs ask for (docs/solver.md 9).

target = W + (alpha W C + r D) (H + damping)^-1. alpha "auto" is the share of ALPHAS whose target, D
left aside, has the least |W X_float - target X|^2 on the tokens that are held out, its delta from
the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitwright import ops
from bitwright.hessian.factored import Factored
from bitwright.spec import F32, F64, Held, InputError, Stats

ALPHA = 0.5
RESIDUAL = 0.125
LOW_BITS = {1: 0.375, 2: 0.375, 3: 0.25}  # r by bits, else RESIDUAL
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def share_of_drift(alpha: float | str) -> float | None:
    """alpha as a number; None where it is to be chosen."""
    if alpha == "auto":
        return None
    if not isinstance(alpha, int | float) or not 0.0 <= alpha <= 1.0:
        raise InputError(f'[gptq] alpha must be 0 to 1 or "auto", got {alpha!r}')
    return float(alpha)


@dataclass(frozen=True, eq=False)
class Drifts:
    """H, C, what is held out and r D (None: no part of the target) of one block of rows."""

    H: F64
    C: F64
    held: Held | None
    pull: F64 | None = None


def residual_of(residual: float | None, bits: int) -> float:
    """r where it is not given."""
    return LOW_BITS.get(bits, RESIDUAL) if residual is None else residual


def drifts_of(stats: Stats, H: F64, residual: float, last: bool = False) -> list[Drifts | None]:
    """The drift of each block of rows (H is (B, k, k)), with `residual` of the stream's error.

    last: nobody else asks; D becomes its share in place."""
    if stats.C is None:
        return [None] * len(H)
    C, found = stats.C.reshape(H.shape), stats.held
    if len(H) == 1 and stats.D is not None and residual:
        pull = np.multiply(residual, stats.D, out=stats.D if last else None)
        return [Drifts(H[0], C[0], found, pull)]
    if found is None:
        return [Drifts(H[b], C[b], None) for b in range(len(H))]
    held_H, held_C = found.H.reshape(H.shape), found.C.reshape(H.shape)
    return [Drifts(H[b], C[b], Held(held_H[b], held_C[b], found.share)) for b in range(len(H))]


def target_of(W: F32, drifts: Drifts, p: Factored, alpha: float | None) -> tuple[F32, float]:
    """W + (alpha W C + r D) (H + damping)^-1, and alpha; None: chosen on the held-out tokens."""
    share = _chosen_alpha(W, drifts, p) if alpha is None else alpha
    target = ops.drift(np.float32(share) * W, drifts.C, p.factor, p.order, drifts.pull)
    target += W
    return target, share


def _chosen_alpha(W: F32, d: Drifts, p: Factored) -> float:
    """The alpha with the least error on the held-out tokens, alpha^2 |delta X|^2 - 2 alpha <W
    (X_float - X), delta X> + ...; the product is <delta_held, delta> under H + damping."""
    if d.held is None:
        return ALPHA
    fit = (d.C - d.held.share * d.held.C) / (1.0 - d.held.share)
    delta = ops.drift(W, fit, p.factor, p.order)
    other = ops.drift(W, d.held.C, p.factor, p.order)

    def size(E: F32) -> float:
        return ops.quadratic(E, d.H) + p.added * ops.energy(E)

    slope = (size(other + delta) - size(other - delta)) / 4
    curve = ops.quadratic(delta, d.held.H)
    return min(ALPHAS, key=lambda alpha: alpha * alpha * curve - 2 * alpha * slope)
