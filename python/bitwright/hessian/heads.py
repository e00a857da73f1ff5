"""Rows of q and k under what attention multiplies them with (docs/solver.md 11).

Scores are q R k^T, R the rotary turn between two positions, so an error E of the rows of a head
(width, k) of q costs tr(M E H E^T), and M is the mean of R A R^T over the distances, A = W_k H
W_k^T of the KV head that it meets; for k the same with all query heads that meet it, turned the
other way (BoA, arXiv 2406.13474, with statistics that are there already). With M = S S^T, S upper
triangular, row a is solved for

    w_a + sum_{b<a} (S_ba / S_aa) e_b,    e_b = w_b - q_b

which lets it make up for what the rows before it lost; the sum over rows of S_aa^2 times their
objectives is tr(M E H E^T). Row a of all heads is solved at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from bitwright import ops
from bitwright.spec import F32, F64, Heads, QTensor

DAMPING = 0.01  # of M, relative to its mean diagonal
NEAR = (0, 1, 2, 4, 8, 16)
FAR = 14  # more, evenly spaced over the window


def metrics(heads: Heads, role: str, partner: F32, H: F64) -> F64:
    """M of each head, (queries or keys, width, width), of the rows that play `role` ("attn.q" or
    "attn.k"); partner: the weights (rows, k) of the other, whose outputs meet them."""
    A = _covariances(heads, partner, H)
    if role == "attn.k":
        A = A.reshape(heads.keys, -1, heads.width, heads.width).mean(1)
        return _turned(A, heads, 1.0)
    return np.repeat(_turned(A, heads, -1.0), heads.queries // heads.keys, 0)


def _covariances(heads: Heads, W: F32, H: F64) -> F64:
    """W_h H W_h^T of each head, by the core's sums: the same bits on every machine."""
    narrow = H.astype(np.float32)
    found = np.zeros((len(W) // heads.width, heads.width, heads.width))
    for h, A in enumerate(found):
        rows = np.ascontiguousarray(W[h * heads.width : (h + 1) * heads.width].T)
        nothing, half = np.zeros_like(rows), np.zeros((heads.width, len(H)))
        ops.cross(rows, narrow, half, nothing)
        ops.cross(np.ascontiguousarray(half.T.astype(np.float32)), rows, A, nothing)
    return found


def _turned(A: F64, heads: Heads, sign: float) -> F64:
    """The mean of R A R^T over distances from 0 to the window's length."""
    near = (distance for distance in NEAR if distance < heads.reach)
    distances = (*near, *(i * heads.reach // (FAR + 2) for i in range(1, FAR + 1)))
    total = np.zeros_like(A)
    for distance in distances:
        angles = [sign * distance * turn for turn in heads.turns.tolist()]
        cos, sin = (np.array([f(x) for x in angles]) for f in (math.cos, math.sin))
        total += _turn(_turn(A, cos, sin).swapaxes(1, 2), cos, sin)
    return (total / len(distances)).astype(np.float32).astype(np.float64)


def _turn(A: F64, cos: F64, sin: F64) -> F64:
    """R A: rows i and i + half of each matrix together."""
    half, out = len(cos), A.copy()
    low, high = A[:, :half], A[:, half : 2 * half]
    out[:, :half] = low * cos[:, None] - high * sin[:, None]
    out[:, half : 2 * half] = high * cos[:, None] + low * sin[:, None]
    return out


def coupled(W: F32, M: F64, solve: Callable[[F32], QTensor]) -> QTensor:
    """W (heads * width, k) rounded row by row under M (heads, width, width). solve: rounds rows
    (heads, k), each on its own."""
    heads, width = M.shape[:2]
    S = np.stack([_factor(one) for one in M])
    S /= np.diagonal(S, axis1=1, axis2=2)[:, None, :].copy()
    rows = W.reshape(heads, width, -1)
    errors = np.zeros_like(rows)
    parts = []
    for a in range(width):
        target = rows[:, a].copy()
        for b in range(a):
            target += S[:, b, a, None] * errors[:, b]
        parts.append(solve(target))
        errors[:, a] = rows[:, a] - ops.decode(parts[-1])
    return _heads_below_each_other(ops.stacked(parts), heads, width)


def _factor(M: F64) -> F32:
    """S of M; of a head whose outputs meet nothing but zeros, that of the unit matrix."""
    return ops.factor(M if M.any() else np.eye(len(M)), DAMPING)[0]


def _heads_below_each_other(q: QTensor, heads: int, width: int) -> QTensor:
    """Rows that came head by head within each place, place by place within each head."""
    return ops.rows_of(q, np.arange(heads * width).reshape(width, heads).T.ravel())
