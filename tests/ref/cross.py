"""C + (before - after)^T X, after = X where it is not given: a float32 multiply-add chain over each
512 tokens, sums in float64.
"""

import numpy as np

from ref import fma


def cross(before, X, C, fused=True, after=None):
    C, after = C.copy(), X if after is None else after
    for first in range(0, len(X), 512):
        part = np.zeros(C.shape, np.float32)
        x = X[first : first + 512].astype(np.float32)
        drift = before[first : first + 512].astype(np.float32) - after[first : first + 512]
        for a, b in zip(drift, x, strict=True):
            part = fma(a[:, None], b[None, :], part, fused)
        C += part
    return C
