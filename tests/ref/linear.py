"""y = x W^T. Exact: one float32 multiply-add chain along k. Fast: int8 codes of x,

q = rint(x / d), d = max |x| / 127 over a segment: 32 columns of a group at most, or the token. Of a
group, with s = sum of d q over its segments (per token of q), in codes of a zero point z,
t = -z s, then t = fma(sum q code, d, t) segment by segment (per token t += sum q code); then
y = fma(t, scale, y), and fma(offset, -s, y) of offsets; per token d y in the end.
"""

import numpy as np

from ref import fma
from ref.decode import decode


def as_bytes(x, d):
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(d > 1e-30, np.float32(1) / d, np.float32(0))
        return np.rint(x * inverse)


def step(x):
    return np.abs(x).max(1, initial=0, keepdims=True) / np.float32(127) + (x - x).sum(1)[:, None]


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
    token, y = step(x), np.zeros((len(x), len(codes)), np.float32)
    longest = 1024 if per_token else 32
    for begin in range(0, x.shape[1], group):
        g, end = begin // group, min(begin + group, x.shape[1])
        parts = [slice(a, min(a + longest, end)) for a in range(begin, end, longest)]
        steps = [token if per_token else step(x[:, part]) for part in parts]
        q = [as_bytes(x[:, part], d) for part, d in zip(parts, steps, strict=True)]
        s = np.zeros((len(x), 1), np.float32)
        for one, d in zip(q, steps, strict=True):
            whole = one.sum(1, keepdims=True, dtype=np.float64).astype(np.float32)
            s = s + (whole if per_token else whole * d)
        zero = 0 if offset else np.float32(middle) if table is not None else zeros[:, g]
        total = np.zeros_like(y) if offset else -s * zero + np.zeros_like(y)
        for part, one, d in zip(parts, q, steps, strict=True):
            products = (one.astype(np.float64) @ levels[codes[:, part]].T).astype(np.float32)
            total = total + products if per_token else fma(products, d, total, fused)
        y = fma(total, scales[:, g] * unit, y, fused)
        if offset:
            y = fma(zeros[:, g], -s, y, fused)
    return y * token if per_token else y


def linear(x, codes, scales, zeros, group, fused=True, table=None, offset=False):
    W = decode(codes, scales, zeros, group, table, offset)
    y = np.zeros((len(x), len(W)), np.float32)
    for p in range(W.shape[1]):
        y = fma(x[:, p, None], W[:, p], y, fused)
    return y
