"""Scale s and zero point z of each row and group, candidates s = to_grid(s0 p) for p in factors.

symmetric:  z = 2^(b-1) = h, s0 = max|w| / (h - 1); search: s0 = max(max w / (h - 1), -min w / h);
            negative: each s is followed by -to_grid(s0' p), s0' that of -w
asymmetric: lo = min(0, min w), hi = max(0, max w), or -1, 1 (with offsets 0, 1) where both are 0;
            s0 = (hi - lo) / top, top = 2^b - 1; z = clamp(rint(-lo p / s) + d, zero_min, top),
            search: d 0, -1, 1, -2, ...; with offsets to_offset_grid(s d / 4 - lo p) for z
tables:     as symmetric with the ends of the table for h - 1 and h, z = 0; where scales are powers
            of two, s0 and the ends are rounded down to one
The first candidate with the least sum_j weight_j |w_j - (c_j - z) s|^power wins.
"""

import numpy as np

from ref import rounded, to_grid, to_offset_grid, units_of


def symmetric_candidates(lo, hi, bits, scale_grid, factors, negative, search, table, unit):
    half = np.float32(2 ** (bits - 1))
    above, below, zero = max(half - 1, np.float32(1)), half, half
    if table is not None:
        above, below, zero = np.float32(table[0][-1]), np.float32(-table[0][0]), np.float32(0)
    power = scale_grid == "e8m0"
    if power and table is not None:
        above, below = (np.exp2(np.floor(np.log2(x))) for x in (above, below))
    starts = []
    for up, down in [(hi, -lo), (-lo, hi)] if negative else [(hi, -lo)]:
        s0 = np.maximum(up / above, down / below) if search else np.maximum(up, down) / above
        s0 = np.where(s0 > 0, s0, np.float32(1))
        starts.append(np.exp2(np.floor(np.log2(s0))) if power else s0)
    signed = list(zip((1, -1), starts, strict=False))
    scales = [sign * to_grid(s0 * p, scale_grid, unit) for p in factors for sign, s0 in signed]
    return [(s.astype(np.float32), np.full_like(s, zero)) for s in scales]


def candidates(
    w, bits, symmetric, zero_min, scale_grid, factors, span, negative, search, table=None,
    offset=False, units=(None, None),
):  # fmt: skip
    """(s, z) of every candidate, in the order in which they are tried."""
    lo, hi = w.min(1, initial=0.0), w.max(1, initial=0.0)
    if symmetric:
        side = (bits, scale_grid, factors, negative, search, table, units[0])
        return symmetric_candidates(lo, hi, *side)
    top = np.float32(2**bits - 1)
    lo, hi = np.where(lo == hi, 0 if offset else -1, lo), np.where(lo == hi, 1, hi)
    shifts = [0] + [sign * d for d in range(1, span + 1) for sign in (-1, 1)] if search else [0]
    tried = []
    for p in factors:
        s = to_grid((hi - lo) / top * p, scale_grid, units[0])
        for d in shifts:
            start = s * np.float32(d / 4) - lo * p
            z = np.clip(np.rint(-lo * p / s) + d, zero_min, top)
            tried.append((s, to_offset_grid(start, scale_grid, units[1]) if offset else z))
    return tried


def fit_group(
    w, weight, bits, symmetric, zero_min, scale_grid, power, factors, search, table=None,
    offset=False, units=(None, None),
):  # fmt: skip
    top, losses, kind = np.float32(2**bits - 1), [], (table, offset)
    side = (bits, symmetric, zero_min, scale_grid, factors, 1, False, search)
    tried = candidates(w, *side, *kind, units)
    for s, z in tried:
        error = w - rounded(w, s[:, None], z[:, None], top, *kind)[1]
        loss = error * error if power == 2.0 else np.abs(error, dtype=np.float64) ** power
        losses.append(np.add.accumulate(loss * weight, 1)[:, -1])
    best = np.argmin(losses, 0), np.arange(len(w))
    scales, zeros = (np.array(part)[best] for part in zip(*tried, strict=True))
    return scales, zeros.astype(np.float32 if offset else np.uint8)


def fit(
    W, weight, bits, group, symmetric, zero_min, scale_grid, power, factors, search, table=None,
    offset=False, levels=None,
):  # fmt: skip
    weight = np.ones(W.shape[1], np.float32) if weight is None else weight
    common = (bits, symmetric, zero_min, scale_grid, power, factors, search, table, offset)
    starts, groups = range(0, W.shape[1], group), []
    for g, i in enumerate(starts):
        here, units = slice(i, i + group), units_of(levels, offset, g)
        groups.append(fit_group(W[:, here], weight[here], *common, units))
    scales, zeros = zip(*groups, strict=True)
    return np.stack(scales, 1), np.stack(zeros, 1)
