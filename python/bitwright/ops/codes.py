"""Codes, scales and zero points: packing, rounding, and what comes out of them."""

from __future__ import annotations

import numpy as np

from bitwright import _core
from bitwright.ops.arrays import (
    check_bits,
    core_grid,
    fit_settings,
    matrix,
    parts,
    vector,
)
from bitwright.spec import F32, U8, U32, InputError, QTensor, Scheme

# Candidate scales of the search, relative to the scale that just spans the range. 1 stands first,
# so that a group of exact codewords keeps its codes.
SEARCH_FACTORS: F32 = np.array([1.0, *(f / 100 for f in range(105, 29, -3))], np.float32)
LARGEST_E4M3 = 448.0


def pack(codes: U8, bits: int) -> U32:
    """Codes uint8 (r, k) to uint32 words (r, ceil(k bits / 32)), least significant bit first."""
    codes = matrix("pack", codes, np.uint8)
    words = np.zeros(
        (codes.shape[0], -(-codes.shape[1] * check_bits("pack", bits) // 32)), np.uint32
    )
    _core.pack(codes, bits, words)
    return words


def unpack(words: U32, bits: int, k: int) -> U8:
    """The inverse of `pack`: words uint32 (r, ceil(k bits / 32)) to codes uint8 (r, k)."""
    words = matrix("unpack", words, np.uint32)
    if -(-k * check_bits("unpack", bits) // 32) != words.shape[1]:
        raise InputError(f"[unpack] wanted words for {k} codes of {bits} bits, got {words.shape}")
    codes = np.empty((words.shape[0], k), np.uint8)
    _core.unpack(words, bits, codes)
    return codes


def fit(
    W: F32,
    scheme: Scheme,
    weight: F32 | None = None,
    *,
    search: bool = False,
    power: float = 2.0,
    factors: F32 = SEARCH_FACTORS,
    whole: float | None = None,
) -> tuple[F32, U8]:
    """Scales float32 (n, G) on the scheme's scale grid and zero points uint8 (n, G) for W (n, k).

    search=False: absmax (symmetric) or min-max. search=True: the factor of the spanning scale with
    the least sum_j weight_j |w_j - q_j|^power, power 2 or 2.4 (GPTQ, 2210.17323), weight (k) or
    ones; asymmetric schemes also try the zero points beside. Tensor schemes are always absmax /
    min-max. whole: the global scale of "e4m3" scales (None: that of W).
    """
    W = matrix("fit", W, np.float32)
    n, k = W.shape
    if scheme.group == -1:
        ends = np.array([[W.min(initial=0.0), W.max(initial=0.0)]], np.float32)
        scale, zero = np.empty((1, 1), np.float32), np.empty((1, 1), np.uint8)
        none = np.empty(0, np.float32)
        side = fit_settings(scheme, 2, False, global_scale=whole or global_scale(W, scheme))
        _core.fit(ends, none, side, none, scale, zero)
        return np.repeat(scale, n, 0), np.repeat(zero, n, 0)
    whole = whole or global_scale(W, scheme)
    settings = fit_settings(scheme, k, search, power, global_scale=whole)
    given = np.empty(0, np.float32) if weight is None else vector("fit", weight, np.float32)
    if weight is not None and len(given) != k:
        raise InputError(f"[fit] wanted a weight of {k} entries, got {len(given)}")
    scales = np.empty((n, scheme.groups(k)), np.float32)
    zeros = np.empty(scales.shape, np.uint8)
    _core.fit(W, given, settings, vector("fit", factors, np.float32), scales, zeros)
    return scales, zeros


def global_scale(W: F32, scheme: Scheme) -> float:
    """What "e4m3" scales are multiplied by when stored, so that the largest group's is the largest
    e4m3 number; 1 for other scales."""
    if scheme.scale != "e4m3":
        return 1.0
    largest = float(np.abs(W).max(initial=0.0))
    top = LARGEST_E4M3 * max(scheme.grid.values)
    return float(np.float32(top / largest)) if largest > 0 else 1.0


def encode(W: F32, scales: F32, zeros: U8, scheme: Scheme, whole: float | None = None) -> QTensor:
    """W (n, k) rounded to the nearest code on given scales and zero points (n, G)."""
    W = matrix("encode", W, np.float32)
    scales, zeros = matrix("encode", scales, np.float32), matrix("encode", zeros, np.uint8)
    codes = np.empty(W.shape, np.uint8)
    _core.encode(W, scales, zeros, scheme.columns(W.shape[1]), core_grid(scheme), codes)
    return QTensor(codes, scales, zeros, scheme, whole or global_scale(W, scheme))


def decode(q: QTensor) -> F32:
    """`QTensor.dequantize` by the C++ core: equal bit for bit, several times faster."""
    W = np.empty(q.shape, np.float32)
    _core.decode(*parts("decode", q), core_grid(q.scheme), W)
    return W


def qlinear(X: F32, q: QTensor) -> F32:
    """X (t, k) times the dequantized matrix transposed: float32 (t, n), exact mode."""
    if not q.scheme.grid.uniform:
        raise InputError(f"[qlinear] wanted a scheme on an integer grid, got {q.scheme.name}")
    X = matrix("qlinear", X, np.float32)
    Y = np.empty((X.shape[0], q.shape[0]), np.float32)
    _core.qlinear(X, *parts("qlinear", q), Y)
    return Y
