"""Codes and scales revised by passes, c or l, each step only where it lowers e H_d e^T.

Levels l = c - z, q = l s, g = (w - q) H_d kept up to date. H_d = H + damping I; a dead column has
nothing but `damping` (1 without) on its diagonal.
c, for each column p: q' = to_grid(q_p + g_p / h_pp), d = q - q', gain = -d (2 g_p + d h_pp).
l, for each group: s' = to_grid(s + g.l / l H l), gain = (s' - s) (2 g.l - (s' - s) l H l);
with offsets then the same with -1 for l and the offset for s; with two levels then, for each block,
with (s / step) l for l and the step for s, and with -offset / step and the offsets' step.
A row rests after a c that, like its last l, gained no more than tolerance of its loss.
"""

import numpy as np

from ref import fma, nearest, per_column, to_grid, to_offset_grid, to_step_grid, units_of


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


def revise(level, run, first, s, stored):
    """The factor s (n,) of `level` in the columns from `first` on: its new value."""
    g, Hd, gain, active, fused = run
    here, zero = slice(first, first + level.shape[1]), np.float32(0)
    slope = chain(g[:, here], level, fused)
    curve = chain(chain(level[:, None], Hd[here, here].T[None], fused), level, fused)
    new = stored(s + slope / np.where(curve > 0, curve, np.float32(1)))
    change = new - s
    won = change * (np.float32(2) * slope - change * curve)
    better = (won > 0) & (curve > 0) & active
    gain += np.where(better, won, zero)
    moved = np.where(better[:, None], level * s[:, None] - level * new[:, None], zero)
    for p, d in enumerate(moved.T):
        g[:] = fma(d[:, None], Hd[first + p], g, fused)
    return np.where(better, new, s)


def rescale(level, run, scales, offsets, group, grid, levels):
    for i in range(scales.shape[1]):
        first, s = i * group, scales[:, i].copy()
        unit, unit_of_offset = units_of(levels, offsets is not None, i)
        part = level[:, first : first + group]
        scales[:, i] = revise(part, run, first, s, signed(np.sign(s), grid, unit))
        if offsets is not None:
            one, o = np.full_like(part, -1), offsets[:, i].copy()
            offsets[:, i] = revise(one, run, first, o, of_either_sign(grid, unit_of_offset))
    for b in range(-(-scales.shape[1] // levels[1]) if levels else 0):
        restep(level, run, scales, levels, b, b, group, grid)
        if offsets is not None:
            at = levels[0].shape[1] // 2 + b
            restep(np.full_like(level, -1), run, offsets, levels, b, at, group, grid)


def signed(sign, grid, unit):
    return lambda wish: sign * to_grid(sign * wish, grid, unit)


def of_either_sign(grid, unit):
    return lambda wish: to_offset_grid(wish, grid, unit)


def restep(level, run, values, levels, b, at, group, grid):
    """Step number `at`, that of the values (scales or offsets) of block b."""
    steps, block, _ = levels
    first, groups = b * block * group, slice(b * block, (b + 1) * block)
    values[:, groups] = np.rint(values[:, groups] / steps[:, at, None])
    here = slice(first, first + block * group)
    multiple = (level * per_column(values, level.shape[1], group))[:, here]
    steps[:, at] = revise(
        multiple, run, first, steps[:, at].copy(), lambda s: to_step_grid(s, grid)
    )
    values[:, groups] = values[:, groups] * steps[:, at, None]


def start(W, Hd, codes, scales, z, offsets, group, table, fused):
    """Levels and g."""
    level = codes - z if table is None else np.float32(table[0])[codes]
    k = W.shape[1]
    e = W - (level * per_column(scales, k, group) - per_column(offsets, k, group))
    g = chain(e[:, None], Hd.T[None], fused)
    return level, g, np.sum(np.float64(e) * g, 1)


def refine(
    W, H, dead, damping, group, bits, grid, pattern, tolerance, codes, scales, zeros, fused=True,
    table=None, offset=False, levels=None,
):  # fmt: skip
    """Codes, scales, offsets (None without) and steps (likewise)."""
    k, scales, Hd = W.shape[1], scales.copy(), damped(H, dead, damping)
    levels = (levels[0].copy(), *levels[1:]) if levels else None
    offsets, none = zeros.copy() if offset else None, np.zeros_like(scales)
    z, top = per_column(none if offset else zeros, k, group), 2**bits - 1
    begin = (codes, scales, z, zeros if offset else none, group, table, fused)
    level, g, loss = start(W, Hd, *begin)
    active = np.ones(len(W), bool)
    resting = {"c": ~active, "l": ~active}
    for name in pattern:
        gain = np.zeros(len(W), np.float32)
        if name == "c":
            s = per_column(scales, k, group)
            gain = descend(level, g, Hd, s, z, top, active, fused, table)
        else:
            rescale(level, (g, Hd, gain, active, fused), scales, offsets, group, grid, levels)
        resting[name] = gain <= tolerance * loss
        loss = loss - gain
        if name == "c":
            active &= ~(resting["c"] & resting["l"])
    codes = level + z if table is None else np.searchsorted(np.float32(table[0]), level)
    return codes.astype(np.uint8), scales, offsets, levels and levels[0]
