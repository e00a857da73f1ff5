"""Codes and scales revised by passes, c or l, each step only where it lowers e H_d e^T.

Levels l = c - z, q = l s, g = (w - q) H_d kept up to date. H_d = H + damping I; a dead column has
nothing but `damping` (1 without) on its diagonal.
c, for each column p: q' = to_grid(q_p + g_p / h_pp), d = q - q', gain = -d (2 g_p + d h_pp).
l, for each group: s' = to_grid(s + g.l / l H l), gain = (s' - s) (2 g.l - (s' - s) l H l).
A row rests after a c that, like its last l, gained no more than tolerance of its loss.
"""

import numpy as np

from ref import fma, nearest, per_column, to_grid


def chain(a, b, fused):
    """Sum over the last axis of a b, one float32 multiply-add after the other."""
    total = np.zeros(np.broadcast_shapes(a.shape, b.shape)[:-1], np.float32)
    for p in range(a.shape[-1]):
        total = fma(a[..., p], b[..., p], total, fused)
    return total


def damped(H, dead, damping):
    live = np.outer(~dead, ~dead)
    alone = np.eye(len(H)) * (damping if damping > 0 else 1.0)
    return np.where(live, H + damping * np.eye(len(H)), alone).astype(np.float32)


def descend(level, g, Hd, s, z, top, active, fused, table):
    gain, zero = np.zeros(len(level), np.float32), np.float32(0)
    for p, h in enumerate(Hd):
        old = level[:, p] * s[:, p]
        new = nearest((old + g[:, p] / h[p]) / s[:, p], z[:, p], top, table)[1]
        d = old - new * s[:, p]
        won = -d * (np.float32(2) * g[:, p] + d * h[p])
        better = (won > 0) & active
        level[:, p] = np.where(better, new, level[:, p])
        gain = gain + np.where(better, won, zero)
        g[:] = fma(np.where(better, d, zero)[:, None], h, g, fused)
    return gain


def rescale(level, g, Hd, scales, group, grid, active, fused):
    gain, zero = np.zeros(len(level), np.float32), np.float32(0)
    for i in range(scales.shape[1]):
        here, s = slice(i * group, (i + 1) * group), scales[:, i].copy()
        part = level[:, here]
        slope = chain(g[:, here], part, fused)
        curve = chain(chain(part[:, None], Hd[here, here].T[None], fused), part, fused)
        wish = s + slope / np.where(curve > 0, curve, np.float32(1))
        new = np.sign(s) * to_grid(np.sign(s) * wish, grid)
        change = new - s
        won = change * (np.float32(2) * slope - change * curve)
        better = (won > 0) & (curve > 0) & active
        scales[:, i], gain = np.where(better, new, s), gain + np.where(better, won, zero)
        moved = np.where(better[:, None], part * s[:, None] - part * new[:, None], zero)
        for p, d in enumerate(moved.T):
            g[:] = fma(d[:, None], Hd[i * group + p], g, fused)
    return gain


def start(W, Hd, codes, scales, z, group, table, fused):
    """Levels and g."""
    level = codes - z if table is None else np.float32(table[0])[codes]
    e = W - level * per_column(scales, W.shape[1], group)
    g = chain(e[:, None], Hd.T[None], fused)
    return level, g, np.sum(np.float64(e) * g, 1)


def refine(
    W, H, dead, damping, group, bits, grid, pattern, tolerance, codes, scales, zeros, fused=True,
    table=None,
):  # fmt: skip
    k, scales, Hd = W.shape[1], scales.copy(), damped(H, dead, damping)
    z, top = per_column(zeros, k, group), 2**bits - 1
    level, g, loss = start(W, Hd, codes, scales, z, group, table, fused)
    active = np.ones(len(W), bool)
    resting = {"c": ~active, "l": ~active}
    for name in pattern:
        if name == "c":
            s = per_column(scales, k, group)
            gain = descend(level, g, Hd, s, z, top, active, fused, table)
        else:
            gain = rescale(level, g, Hd, scales, group, grid, active, fused)
        resting[name] = gain <= tolerance * loss
        loss = loss - gain
        if name == "c":
            active &= ~(resting["c"] & resting["l"])
    codes = level + z if table is None else np.searchsorted(np.float32(table[0]), level)
    return codes.astype(np.uint8), scales
