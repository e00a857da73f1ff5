"""y = x W^T. Exact: one float32 multiply-add chain along k. Fast: int8 codes of x,

q = rint(x / d), d = max |x| / 127 over a segment: 32 columns of a group at most, or the token;
y = fma(sum q (code - zero), scale d, y) segment by segment; per token scale alone, then d y;
with offsets y = fma(sum q code, scale d, y), then fma(-offset, d sum q, y).
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
    """Levels and zero point of codes as bytes, and the unit they count in."""
    if table is None:
        return np.arange(2**bits), 2 ** (bits - 1), np.float32(1)
    levels = np.float32(table[0])
    least, most = levels[levels > 0].min(), np.abs(levels).max()
    whole = most <= 127 * least and np.all(np.rint(levels / least) * least == levels)
    unit = least if whole else most / np.float32(127)
    return np.rint(levels / unit), 0, unit


def fast(x, codes, scales, zeros, group, bits, per_token, fused, table=None, offset=False):
    levels, _, unit = levels_of(table, bits)
    zeros = np.asarray(zeros, np.float32)
    token, y = step(x), np.zeros((len(x), len(codes)), np.float32)
    longest = 1024 if per_token else 32
    for begin in range(0, x.shape[1], group):
        g, end = begin // group, min(begin + group, x.shape[1])
        for a in range(begin, end, longest):
            part = slice(a, min(a + longest, end))
            d = token if per_token else step(x[:, part])
            one = np.float32(1) if per_token else d
            q = as_bytes(x[:, part], d)
            zero = 0 if offset or table is not None else zeros[:, g, None]
            total = q.astype(np.float64) @ (levels[codes[:, part]] - zero).T
            y = fma(total.astype(np.float32), scales[:, g] * unit * one, y, fused)
            if offset:
                sums = q.sum(1, keepdims=True, dtype=np.float64).astype(np.float32) * one
                y = fma(-zeros[:, g], sums, y, fused)
    return y * token if per_token else y


def linear(x, codes, scales, zeros, group, fused=True, table=None, offset=False):
    W = decode(codes, scales, zeros, group, table, offset)
    y = np.zeros((len(x), len(W)), np.float32)
    for p in range(W.shape[1]):
        y = fma(x[:, p, None], W[:, p], y, fused)
    return y
