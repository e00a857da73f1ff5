"""AWQ (2306.00978): column scales from activation magnitudes, chosen by the layer objective.

s_j = mean|x_j|^a, normalised by sqrt(max s min s); W diag(s) is quantized and diag(1/s) goes into
the norm in front. The reference picks a by the output of the whole scaled sub-block; here each
candidate is scored by sum over the group's matrices of tr(E H E^T), E = W - round(W diag(s))
diag(1/s) (docs/solver.md 10): no forward pass, the same quantity the solver minimises. Limits: only
groups behind a norm can absorb scales; o and down have none. AWQ's clipping is the solver's: rtn,
scales="clip".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bitwright import ops
from bitwright.spec import F32, InputError, Rescale, Scheme, Stats

EXPONENTS = tuple(a / 20 for a in range(20))  # 0 .. .95, the paper's grid
SMALLEST = 1e-4  # of mean|x|, as in the paper's code: dead columns keep a finite scale


def candidates(mean_abs: F32) -> F32:
    """Column scales float32 (20, k), one row per exponent."""
    size = np.maximum(mean_abs.astype(np.float64), SMALLEST)
    s = size ** np.array(EXPONENTS)[:, None]
    middle = np.sqrt(s.max(1, keepdims=True) * s.min(1, keepdims=True))
    return np.asarray(s / middle, np.float32)


def plan(weights: Sequence[F32], stats: Stats, scheme: Scheme) -> Rescale:
    """The best column scales (k,) for matrices (n_i, k) that share the input of `stats`."""
    if stats.H is None:
        raise InputError("[awq] wanted Stats with H, got none: AWQ needs calibration inputs")
    scales = candidates(stats.mean_abs)
    H = stats.H
    losses = np.sum([ops.awq_scale(W, H, scales, scheme) for W in weights], axis=0)
    best = int(np.argmin(losses))
    return Rescale(scales[best], EXPONENTS[best])
