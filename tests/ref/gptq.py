"""Columns in `order`, p = 0 .. k-1: round the target, keep the error, feed it forward.

t_p = w_p + a_p / R_pp,  q_p = (c - z) s with c = clamp(rint(t_p / s) + z),  e_p = w_p - q_p,
with offsets q_p = c s - z, c = clamp(rint((t_p + z) / s)),
a_j += e_p R_pj for j > p,  loss = sum_p (R_pp (t_p - q_p))^2.
"""

import numpy as np

from ref import fma, per_column, rounded


def gptq(W, R, order, scales, zeros, group, bits, fused=True, table=None, offset=False):
    n, k = W.shape
    s, z = per_column(scales, k, group), per_column(zeros, k, group)
    codes, loss, A = np.zeros((n, k), np.uint8), np.zeros(n), np.zeros((n, k), np.float32)
    for p, column in enumerate(order):
        w, scale, zero = W[:, column], s[:, column], z[:, column]
        t = w + A[:, p] / R[p, p]
        code, q = rounded(t, scale, zero, 2**bits - 1, table, offset)
        codes[:, column] = code
        loss += np.float64(R[p, p] * (t - q)) ** 2
        A[:, p + 1 :] = fma((w - q)[:, None], R[p, p + 1 :], A[:, p + 1 :], fused)
    return codes, loss
