"""C + (before - X)^T X: a float32 multiply-add chain over each 512 tokens, sums in float64."""

import numpy as np

from ref import fma


def cross(before, X, C, fused=True):
    C = C.copy()
    for first in range(0, len(X), 512):
        part = np.zeros(C.shape, np.float32)
        x = X[first : first + 512].astype(np.float32)
        drift = before[first : first + 512].astype(np.float32) - x
        for a, b in zip(drift, x, strict=True):
            part = fma(a[:, None], b[None, :], part, fused)
        C += part
    return C
