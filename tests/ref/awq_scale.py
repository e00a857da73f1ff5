"""For each s: tr(E H E^T), E = (W diag(s) - Q) diag(1/s), Q = W diag(s) rounded on its range."""

import numpy as np

from ref.decode import decode
from ref.encode import encode
from ref.fit import fit
from ref.quadratic import quadratic


def errors(W, s, bits, group, symmetric, zero_min, scale_grid):
    V, one = W * s, np.ones(1, np.float32)
    grid = fit(V, None, bits, group, symmetric, zero_min, scale_grid, 2.0, one, False)
    return (V - decode(encode(V, *grid, group, bits), *grid, group)) / s


def awq_scale(W, H, column_scales, *grid):
    return np.array([quadratic(errors(W, s, *grid), H) for s in column_scales])
