"""Codes and scales revised by passes, c or l, each step only where it lowers e H_d e^T.

Levels l = c - z, q = l s, g = (w - q) H_d kept up to date. H_d = H + damping I; a dead column has
nothing but `damping` (1 without) on its diagonal.
c, for each column p: q' = to_grid(q_p + g_p / h_pp), d = q - q', gain = -d (2 g_p + d h_pp).
l, for each group: s' = to_grid(s + g.l / l H l), gain = (s' - s) (2 g.l - (s' - s) l H l).
A row rests after a c that, like its last l, gained no more than tolerance of its loss.
"""

import numpy as np

from ref import fma, per_column, to_grid


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


def descend(level, g, Hd, s, z, top, active, fused):
    gain, zero = np.zeros(len(level), np.float32), np.float32(0)
    for p, h in enumerate(Hd):
        old = level[:, p] * s[:, p]
        code = np.clip(np.rint((old + g[:, p] / h[p]) / s[:, p]) + z[:, p], 0, top)
        d = old - (code - z[:, p]) * s[:, p]
        won = -d * (np.float32(2) * g[:, p] + d * h[p])
        better = (won > 0) & active
        level[:, p] = np.where(better, code - z[:, p], level[:, p])
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


def refine(
    W, H, dead, damping, group, bits, grid, pattern, tolerance, codes, scales, zeros, fused=True
):
    k, scales, Hd = W.shape[1], scales.copy(), damped(H, dead, damping)
    z = per_column(zeros, k, group)
    level = codes - z
    e = W - level * per_column(scales, k, group)
    g = chain(e[:, None], Hd.T[None], fused)
    loss, active = np.sum(np.float64(e) * g, 1), np.ones(len(W), bool)
    resting = {"c": ~active, "l": ~active}
    for name in pattern:
        if name == "c":
            side = per_column(scales, k, group), z, 2**bits - 1
            gain = descend(level, g, Hd, *side, active, fused)
        else:
            gain = rescale(level, g, Hd, scales, group, grid, active, fused)
        resting[name] = gain <= tolerance * loss
        loss = loss - gain
        if name == "c":
            active &= ~(resting["c"] & resting["l"])
    return (level + z).astype(np.uint8), scales
