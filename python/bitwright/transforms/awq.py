"""AWQ (2306.00978): column scales from activation magnitudes, chosen by the layer objective.

s_j = mean|x_j|^a, normalised by sqrt(max s min s); W diag(s) is quantized and diag(1/s) goes into the
norm in front. The reference picks a by the output of the whole scaled sub-block; here each candidate
is scored by sum over the group's matrices of tr(E H E^T), E = W - round(W diag(s)) diag(1/s)
(solver.md 10): no forward pass, the same quantity the solver minimises. Limits: only groups behind a
norm can absorb scales (o and down have none: they get the clip search alone).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bitwright import ops
from bitwright.spec import F32, U8, InputError, Rescale, Scheme, Stats

EXPONENTS = tuple(a / 20 for a in range(20))  # 0 .. .95, the paper's grid
SMALLEST = 1e-4  # of mean|x|, as in the paper's code: dead columns keep a finite scale
CLIP_SKIPS = ("attn.q", "attn.k")  # rows that attention multiplies with each other: range kept


def candidates(mean_abs: F32) -> F32:
    """Column scales float32 (20, k), one row per exponent."""
    size = np.maximum(mean_abs.astype(np.float64), SMALLEST)
    s = size ** np.array(EXPONENTS)[:, None]
    return (s / np.sqrt(s.max(1, keepdims=True) * s.min(1, keepdims=True))).astype(np.float32)


def plan(weights: Sequence[F32], stats: Stats, scheme: Scheme) -> Rescale:
    """The best column scales (k,) for matrices (n_i, k) that share the input of `stats`."""
    if stats.H is None:
        raise InputError("[awq] wanted Stats with H, got none: AWQ needs calibration inputs")
    scales = candidates(stats.mean_abs)
    H = stats.H
    losses = np.sum([ops.awq_scale(W, H, scales, scheme) for W in weights], axis=0)
    best = int(np.argmin(losses))
    return Rescale(scales[best], EXPONENTS[best])


def clip(W: F32, stats: Stats, scheme: Scheme) -> tuple[F32, U8]:
    """Scales and zeros (n, G) with each group's range shrunk to its least error, down to one half."""
    if stats.H is None:
        raise InputError("[awq] wanted Stats with H, got none: AWQ needs calibration inputs")
    return ops.awq_clip(W, stats.H, scheme)
