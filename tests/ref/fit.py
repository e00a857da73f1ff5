"""Scale s and zero point z of each row and group, candidates s = to_grid(s0 p) for p in factors.

symmetric:  z = 2^(b-1) = h, s0 = max|w| / (h - 1); search: s0 = max(max w / (h - 1), -min w / h)
asymmetric: lo = min(0, min w), hi = max(0, max w), or -1, 1 where both are 0; s0 = (hi - lo) / top,
            top = 2^b - 1; z = clamp(rint(-lo p / s) + shift, zero_min, top), search: shift 0, -1, 1
The first candidate with the least sum_j weight_j |w_j - (c_j - z) s|^power wins.
"""

import numpy as np

from ref import to_grid


def fit_group(w, weight, bits, symmetric, zero_min, scale_grid, power, factors, search):
    top, half = np.float32(2**bits - 1), np.float32(2 ** (bits - 1))
    lo, hi = w.min(1, initial=0.0), w.max(1, initial=0.0)
    if symmetric:
        below = max(half - 1, np.float32(1))
        s0 = np.maximum(hi / below, -lo / half) if search else np.maximum(hi, -lo) / below
        s0[s0 == 0] = 1
    else:
        lo, hi = np.where(lo == hi, -1, lo), np.where(lo == hi, 1, hi)
        s0 = (hi - lo) / top
    tried = []
    for p in factors:
        s = to_grid(s0 * p, scale_grid)
        for shift in (0, -1, 1) if search and not symmetric else (0,):
            z = np.clip(np.rint(-lo * p / s) + shift, zero_min, top)
            z = np.full_like(s, half) if symmetric else z
            code = np.clip(np.rint(w / s[:, None]) + z[:, None], 0, top)
            error = w - (code - z[:, None]) * s[:, None]
            loss = error * error if power == 2.0 else np.abs(error, dtype=np.float64) ** power
            tried.append((np.add.accumulate(loss * weight, 1)[:, -1], s, z))
    scores, scales, zeros = (np.array(column) for column in zip(*tried, strict=True))
    best = np.argmin(scores, 0), np.arange(len(w))
    return scales[best], zeros[best].astype(np.uint8)


def fit(W, weight, bits, group, symmetric, zero_min, scale_grid, power, factors, search):
    weight = np.ones(W.shape[1], np.float32) if weight is None else weight
    common = (bits, symmetric, zero_min, scale_grid, power, factors, search)
    starts = range(0, W.shape[1], group)
    groups = [fit_group(W[:, i : i + group], weight[i : i + group], *common) for i in starts]
    scales, zeros = zip(*groups, strict=True)
    return np.stack(scales, 1), np.stack(zeros, 1)
