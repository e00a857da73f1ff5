"""delta = (W C + D) (R R^T)^-1, columns in `order`: y = W C + D, then v R^T = y backwards, x R =
v forwards.

Each is one multiply-add chain: (W C)_i over ascending k; a solve x U = a is, for j = 0 .. k-1,
e_j = 0 - (0 + a_j / U_jj), a_i += e_j U_ji for i > j, x = -e. v R^T = y is that with columns
reversed.
"""

import numpy as np

from ref import fma


def solved(U, a, fused):
    a, e = a.copy(), np.zeros_like(a)
    for j in range(len(U)):
        e[:, j] = 0 - (0 + a[:, j] / U[j, j])
        a[:, j + 1 :] = fma(e[:, j, None], U[j, j + 1 :], a[:, j + 1 :], fused)
    return -e


def drift(W, C, R, order, fused=True, D=None):
    C, y = C[:, order].astype(np.float32), np.zeros_like(W)
    for p in range(W.shape[1]):
        y = fma(C[p], W[:, p, None], y, fused)
    y = y if D is None else y + D[:, order].astype(np.float32)
    v = solved(np.ascontiguousarray(R.T[::-1, ::-1]), y[:, ::-1], fused)[:, ::-1]
    delta = np.empty_like(W)
    delta[:, order] = solved(R, v, fused)
    return delta
