"""gptq with the scale and zero point of each group chosen on the way.

With a_j the feedback of all earlier groups, the group's targets without rounding are u: the
recursion of gptq.py with q = t, u = w - e. Candidates are those of fit.py for the range of u. Each
is run through the group's own recursion; the first with the least float32 loss is kept.
"""

import numpy as np

from ref import fma, rounded, units_of
from ref.fit import candidates


def inside(w, a, R, s, z, top, fused, table=None, offset=False):
    """Errors, codes and losses of one group's columns; s None: nothing is rounded."""
    a, e, loss = a.copy(), np.zeros_like(w), np.zeros(len(w), np.float32)
    codes = np.zeros(w.shape, np.uint8)
    for p in range(w.shape[1]):
        t = w[:, p] + a[:, p] / R[p, p]
        value = t
        if s is not None:
            codes[:, p], value = rounded(t, s, z, top, table, offset)
            residual = R[p, p] * (t - value)
            loss = loss + residual * residual
        e[:, p] = w[:, p] - value
        a[:, p + 1 :] = fma(e[:, p, None], R[p, p + 1 :], a[:, p + 1 :], fused)
    return e, codes, loss


def gptq_search(
    W, R, order, group, bits, symmetric, zero_min, grid, factors, span, negative, fused, table=None,
    offset=False, levels=None,
):  # fmt: skip
    (n, k), top = W.shape, np.float32(2**bits - 1)
    scales, zeros = np.zeros((2, n, -(-k // group)), np.float32)
    codes, loss, A = np.zeros((n, k), np.uint8), np.zeros(n), np.zeros((n, k), np.float32)
    first = 0
    while first < k:
        g = order[first] // group
        here = slice(first, first + min(group, k - g * group))
        w, a, r = W[:, order[here]], A[:, here], R[here, here]
        u = w - inside(w, a, r, None, None, top, fused)[0]
        kind = (bits, symmetric, zero_min, grid)
        units = units_of(levels, offset, g)
        tried = candidates(u, *kind, factors, span, negative, True, table, offset, units)
        losses = [inside(w, a, r, s, z, top, fused, table, offset)[2] for s, z in tried]
        best = np.argmin(losses, 0), np.arange(n)
        s, z = (np.array(part)[best] for part in zip(*tried, strict=True))
        scales[:, g], zeros[:, g] = s, z
        e, codes[:, order[here]], lost = inside(w, a, r, s, z, top, fused, table, offset)
        loss += lost
        for p in range(w.shape[1]):
            A[:, here.stop :] = fma(
                e[:, p, None], R[first + p, here.stop :], A[:, here.stop :], fused
            )
        first = here.stop
    return codes, scales, zeros.astype(np.float32 if offset else np.uint8), loss
