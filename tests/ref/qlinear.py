"""y = x W^T with w = (code - z) s: one float32 multiply-add chain along k, ascending."""

import numpy as np

from ref import fma
from ref.decode import decode


def qlinear(x, codes, scales, zeros, group, fused=True):
    W = decode(codes, scales, zeros, group)
    y = np.zeros((len(x), len(W)), np.float32)
    for p in range(W.shape[1]):
        y = fma(x[:, p, None], W[:, p], y, fused)
    return y
