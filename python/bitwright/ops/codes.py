"""Codes, scales and zero points: packing, rounding, and what comes out of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bitwright import _core
from bitwright.ops.arrays import (
    BFLOAT16,
    check_bits,
    core_grid,
    fit_settings,
    floats,
    matrix,
    parts,
    steps_in,
    vector,
    zeros_in,
    zeros_out,
)
from bitwright.spec import F32, U8, U32, InputError, QTensor, Scheme

# Candidate scales of the search, relative to the scale that just spans the range. 1 stands first,
# so that a group of exact codewords keeps its codes.
SEARCH_FACTORS: F32 = np.array([1.0, *(f / 100 for f in range(105, 29, -3))], np.float32)
LARGEST_E4M3 = 448.0
STEP_ROOM = 1.05  # the search goes so far above the scale that spans the range
STEP_TYPES = {"bf16": BFLOAT16, "fp16": np.dtype(np.float16)}


def pack(codes: U8, bits: int) -> U32:
    """Codes uint8 (r, k) to uint32 words (r, ceil(k bits / 32)), least significant bit first."""
    codes = matrix("pack", codes, np.uint8)
    words = np.zeros(
        (codes.shape[0], -(-codes.shape[1] * check_bits("pack", bits) // 32)), np.uint32
    )
    _core.pack(codes, bits, words)
    return words


def round_pack(W: npt.NDArray[Any], scheme: Scheme) -> tuple[U32, F32, U8 | F32]:
    """Words, scales and zero points of W (n, k), float32, float16 or bfloat16, rounded to nearest:
    `fit` without a search, `encode` and `pack` in one, with no array of floats or codes between.
    Integer schemes by group or channel, with zero points and scales of one level."""
    W = floats("round_pack", W)
    if not scheme.plain or scheme.group == -1 or scheme.scale == "e4m3":
        raise InputError(
            f"[round_pack] wanted a plain integer scheme by group or channel, got {scheme.name}"
        )
    n, k = W.shape
    settings = fit_settings(scheme, k, False)
    scales = np.empty((n, scheme.groups(k)), np.float32)
    zeros = np.empty(scales.shape, np.float32)
    words = np.empty((n, -(-k * scheme.bits // 32)), np.uint32)
    if W.dtype == np.float32:
        _core.round_pack_f32(W, settings, scales, zeros, words)
    else:
        bf16 = W.dtype == BFLOAT16
        _core.round_pack_u16(W.view(np.uint16), bf16, settings, scales, zeros, words)
    return words, scales, zeros_out(zeros, scheme)


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
    steps: F32 | None = None,
) -> tuple[F32, U8 | F32]:
    """Scales float32 (n, G) on the scheme's scale grid and zero points (n, G) for W (n, k): uint8,
    or the offsets of schemes that have them, float32.

    search=False: absmax (symmetric) or min-max. search=True: the factor of the spanning scale with
    the least sum_j weight_j |w_j - q_j|^power, power 2 or 2.4 (GPTQ, 2210.17323), weight (k) or
    ones; asymmetric schemes also try the zero points beside. Tensor schemes are always absmax /
    min-max. whole: the global scale of "e4m3" scales (None: that of W). steps: of two-level scales
    (None: `block_steps` of W).
    """
    W = matrix("fit", W, np.float32)
    n, k = W.shape
    whole = whole or global_scale(W, scheme)
    if scheme.group == -1:
        ends = np.array([[W.min(initial=0.0), W.max(initial=0.0)]], np.float32)
        W, weight, search, factors = ends, None, False, factors[:0]
    elif steps is None:
        steps = block_steps(W, scheme)
    given = np.empty(0, np.float32) if weight is None else vector("fit", weight, np.float32)
    if weight is not None and len(given) != k:
        raise InputError(f"[fit] wanted a weight of {k} entries, got {len(given)}")
    settings = fit_settings(scheme, W.shape[1], search, power, global_scale=whole)
    scales = np.empty((len(W), scheme.groups(k)), np.float32)
    zeros, units = np.empty(scales.shape, np.float32), steps_in("fit", steps, len(W))
    _core.fit(W, given, settings, vector("fit", factors, np.float32), units, scales, zeros)
    if scheme.group == -1:
        scales, zeros = np.repeat(scales, n, 0), np.repeat(zeros, n, 0)
    return scales, zeros_out(zeros, scheme)


def block_steps(
    W: F32, scheme: Scheme, weight: F32 | None = None, *, search: bool = False
) -> F32 | None:
    """Steps float32 (n, blocks) of two-level scales: the largest scale of the block, and STEP_ROOM
    more, is the largest multiple of it; of offsets likewise, of no less than that scale. None where
    scales have one level.

    weight, search: how those scales are found, as in `fit`.
    """
    if not scheme.block:
        return None
    k = W.shape[1]
    plain = replace(scheme, scale="fp32", block=0, scale_bits=0)
    scales, zeros = fit(W, plain, weight, search=search)
    columns = np.arange(0, k, scheme.columns(k))
    live = np.maximum.reduceat(np.abs(W), columns, axis=1) > 0  # others have a scale for nothing
    peaks = [np.abs(scales) * live]
    if scheme.offset:
        peaks.append(np.maximum(np.maximum(zeros, 0.0), peaks[0]))
    starts = np.arange(0, scheme.groups(k), scheme.block)
    found = np.hstack([np.maximum.reduceat(values, starts, axis=1) for values in peaks])
    top = (1 << (scheme.scale_bits - scheme.symmetric)) - 1
    smallest, largest = (2.0**-24, 65504.0) if scheme.scale == "fp16" else (2.0**-126, 2.0**126)
    steps = np.clip(found * np.float32(STEP_ROOM / top), smallest, largest)
    return np.ascontiguousarray(steps.astype(STEP_TYPES[scheme.scale]).astype(np.float32))


def global_scale(W: F32, scheme: Scheme) -> float:
    """What "e4m3" scales are multiplied by when stored, so that the largest group's is the largest
    e4m3 number; 1 for other scales."""
    if scheme.scale != "e4m3":
        return 1.0
    largest = float(np.abs(W).max(initial=0.0))
    top = LARGEST_E4M3 * max(scheme.grid.values)
    return float(np.float32(top / largest)) if largest > 0 else 1.0


def encode(
    W: F32,
    scales: F32,
    zeros: U8 | F32,
    scheme: Scheme,
    whole: float | None = None,
    steps: F32 | None = None,
) -> QTensor:
    """W (n, k) rounded to the nearest code on given scales and zero points (n, G)."""
    W, scales = matrix("encode", W, np.float32), matrix("encode", scales, np.float32)
    codes, given = np.empty(W.shape, np.uint8), zeros_in("encode", zeros, scheme)
    _core.encode(W, scales, given, scheme.columns(W.shape[1]), core_grid(scheme), codes)
    if steps is None:
        steps = block_steps(W, scheme)
    return QTensor(codes, scales, zeros, scheme, whole or global_scale(W, scheme), steps)


def decode(q: QTensor) -> F32:
    """`QTensor.dequantize` by the C++ core: equal bit for bit, several times faster."""
    W = np.empty(q.shape, np.float32)
    _core.decode(*parts("decode", q), core_grid(q.scheme), W)
    return W if q.order is None else np.ascontiguousarray(W[:, np.argsort(q.order)])


def stacked(parts: Sequence[QTensor]) -> QTensor:
    """The rows of several matrices of one scheme, below each other."""
    if len(parts) == 1:
        return parts[0]
    codes, scales, zeros = (
        np.concatenate([getattr(q, name) for q in parts]) for name in ("codes", "scales", "zeros")
    )
    steps = None
    if parts[0].steps is not None:
        steps = np.concatenate([q.steps for q in parts if q.steps is not None])
    return QTensor(codes, scales, zeros, parts[0].scheme, parts[0].global_scale, steps)


def rows_of(q: QTensor, rows: slice | npt.NDArray[np.intp]) -> QTensor:
    """Some rows of a matrix, in that order."""
    steps = None if q.steps is None else q.steps[rows]
    return replace(q, codes=q.codes[rows], scales=q.scales[rows], zeros=q.zeros[rows], steps=steps)


def qlinear(X: F32, q: QTensor) -> F32:
    """X (t, k) times the dequantized matrix transposed: float32 (t, n), exact mode."""
    if not q.scheme.grid.uniform or q.scheme.offset:
        raise InputError(f"[qlinear] wanted an integer grid with zero points, got {q.scheme.name}")
    X = matrix("qlinear", X if q.order is None else X[:, q.order], np.float32)
    Y = np.empty((X.shape[0], q.shape[0]), np.float32)
    _core.qlinear(X, *parts("qlinear", q), Y)
    return Y
