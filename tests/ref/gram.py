"""H + X^T X: one float32 multiply-add chain over each 512 tokens, their sum in float64."""

import numpy as np

from ref import fma


def gram(X, H, fused=True):
    H = H.copy()
    for first in range(0, len(X), 512):
        C = np.zeros(H.shape, np.float32)
        for x in X[first : first + 512].astype(np.float32):
            C = fma(x[:, None], x[None, :], C, fused)
        H += C
    return H
