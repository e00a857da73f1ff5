"""C + before^T X: a float32 multiply-add chain over each 512 tokens, sums in float64."""

import numpy as np

from ref import fma


def cross(before, X, C, fused=True):
    C = C.copy()
    for first in range(0, len(X), 512):
        part = np.zeros(C.shape, np.float32)
        rows = slice(first, first + 512)
        for a, b in zip(*(x[rows].astype(np.float32) for x in (before, X)), strict=True):
            part = fma(a[:, None], b[None, :], part, fused)
        C += part
    return C
