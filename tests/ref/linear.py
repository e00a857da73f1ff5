"""y = x W^T. Exact: one float32 multiply-add chain along k. Fast: int8 codes of x,

q = rint(x / d), d = max |x| / 127 over a segment: 128 columns of a group at most, or the token. Of
a segment whose d^2 is more than 4 times the mean of the token's others, a second digit
rint((x - d q) / (d / 254)) on d / 254, which follows the first wherever that goes. Of a group, with
s = sum of d q over its segments (per token of q), in codes of a zero point z, t = -z s, then
t = fma(sum q code, d, t) segment by segment (per token t += sum q code); then y = fma(t, scale, y),
and fma(offset, -s, y) of offsets; per token d y in the end.
"""

import numpy as np

from ref import fma
from ref.decode import decode


def inverse_of(d):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(d > 1e-30, np.float32(1) / d, np.float32(0))


def as_bytes(x, d):
    with np.errstate(invalid="ignore"):
        return np.rint(x * inverse_of(d))


def step(x):
    return np.abs(x).max(1, initial=0, keepdims=True) / np.float32(127) + (x - x).sum(1)[:, None]


def parts_of(k, group, longest):
    """(group, columns) of each segment."""
    for begin in range(0, k, group):
        end = min(begin + group, k)
        for a in range(begin, end, longest):
            yield begin // group, slice(a, min(a + longest, end))


def stands_out(steps):
    """Of segments' steps (t, 1), which ask for a second digit."""
    squares = [d * d for d in steps]
    total = np.zeros_like(squares[0])
    for square in squares:
        total = total + square
    others = np.float32(len(steps) - 1)
    with np.errstate(invalid="ignore"):
        return [square * others > np.float32(4) * (total - square) for square in squares]


def digits_of(x, group, per_token, fused):
    """(group, columns, codes, step) in the order of multiplication; codes (t, columns)."""
    parts = list(parts_of(x.shape[1], group, 1024 if per_token else 128))
    if per_token:
        d = step(x)
        return [(g, part, as_bytes(x[:, part], d), d) for g, part in parts]
    steps, found = [step(x[:, part]) for _, part in parts], []
    for (g, part), d, finer in zip(parts, steps, stands_out(steps), strict=True):
        q = as_bytes(x[:, part], d)
        found.append((g, part, q, d))
        if finer.any():
            rest = fma(q, -d, x[:, part], fused) * inverse_of(d / np.float32(254))
            one = np.where(finer, np.rint(rest), np.float32(0))
            found.append((g, part, one, np.where(finer, d / np.float32(254), np.float32(0))))
    return found


def levels_of(table, bits):
    """Codes as unsigned bytes, the zero point that all have, and the unit they count in."""
    if table is None:
        return np.arange(2**bits), 2 ** (bits - 1), np.float32(1)
    levels = np.float32(table[0])
    least, most = levels[levels > 0].min(), np.abs(levels).max()
    whole = most <= 127 * least and np.all(np.rint(levels / least) * least == levels)
    unit = least if whole else most / np.float32(127)
    steps = np.rint(levels / unit)
    return steps - steps[0], -steps[0], unit


def fast(x, codes, scales, zeros, group, bits, per_token, fused, table=None, offset=False):
    levels, middle, unit = levels_of(table, bits)
    zeros = np.asarray(zeros, np.float32)
    y = np.zeros((len(x), len(codes)), np.float32)
    digits = digits_of(x, group, per_token, fused)
    for g in range(scales.shape[1]):
        here = [digit for digit in digits if digit[0] == g]
        s = np.zeros((len(x), 1), np.float32)
        for _, _, one, d in here:
            whole = one.sum(1, keepdims=True, dtype=np.float64).astype(np.float32)
            s = s + (whole if per_token else whole * d)
        zero = 0 if offset else np.float32(middle) if table is not None else zeros[:, g]
        total = np.zeros_like(y) if offset else -s * zero + np.zeros_like(y)
        for _, part, one, d in here:
            products = (one.astype(np.float64) @ levels[codes[:, part]].T).astype(np.float32)
            total = total + products if per_token else fma(products, d, total, fused)
        y = fma(total, scales[:, g] * unit, y, fused)
        if offset:
            y = fma(zeros[:, g], -s, y, fused)
    return y * step(x) if per_token else y


def linear(x, codes, scales, zeros, group, fused=True, table=None, offset=False):
    W = decode(codes, scales, zeros, group, table, offset)
    y = np.zeros((len(x), len(W)), np.float32)
    for p in range(W.shape[1]):
        y = fma(x[:, p, None], W[:, p], y, fused)
    return y
