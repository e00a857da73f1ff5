"""Sums over tokens and over errors.

products: how bf16 inputs are multiplied. "float32": widened, one multiply-add chain, the same bits
at every instruction set. "bfloat16": by the machine's own product of pairs; products are exact in
float32 all the same, the sums round in another order. None: "bfloat16" where the machine has it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bitwright import _core
from bitwright.ops.arrays import BFLOAT16, floats, in_place, matrix
from bitwright.ops.codes import decode
from bitwright.spec import F32, F64, InputError, QTensor

PRODUCTS = ("float32", "bfloat16")


def products_of(dtype: npt.DTypeLike, wish: str | None = None) -> str:
    """What `products` = wish comes to for inputs of a dtype; InputError where it cannot be had."""
    possible = dtype == BFLOAT16 and _core.multiplies_bf16()
    if wish not in (None, *PRODUCTS) or (wish == "bfloat16" and not possible):
        raise InputError(
            f"[sums] wanted products of {' or '.join(PRODUCTS)} (the latter for bfloat16 inputs on "
            f"a machine that multiplies them), got {wish!r}, {np.dtype(dtype)} and {_core.isa()}"
        )
    return wish or ("bfloat16" if possible else "float32")


def gram(X: npt.NDArray[Any], H: F64, products: str | None = None) -> None:
    """H += X^T X in place, upper triangle only (see `mirror`). X (t, k): float32, float16,
    bfloat16. products: see above.
    """
    X = floats("gram", X)
    H = in_place("gram", H, np.float64, (X.shape[1], X.shape[1]))
    pairs = products_of(X.dtype, products) == "bfloat16"
    if X.dtype == np.float32:
        _core.gram_f32(X, H)
    else:
        _core.gram_u16(X.view(np.uint16), X.dtype == BFLOAT16, pairs, H)


def cross(
    before: npt.NDArray[Any],
    X: npt.NDArray[Any],
    C: F64,
    after: npt.NDArray[Any] | None = None,
    products: str | None = None,
) -> None:
    """C += (before - after)^T X in place, C (h, k); before and after (t, h), X (t, k) of one dtype,
    as for `gram`. after: None for X, how the inputs drifted. products: see above."""
    before, X = floats("cross", before), floats("cross", X)
    after = X if after is None else floats("cross", after)
    if not before.dtype == after.dtype == X.dtype:
        raise InputError(
            f"[cross] wanted inputs of one dtype, got {before.dtype}, {after.dtype} and {X.dtype}"
        )
    C = in_place("cross", C, np.float64, (before.shape[1], X.shape[1]))
    pairs = products_of(X.dtype, products) == "bfloat16"
    if X.dtype == np.float32:
        _core.cross_f32(before, after, X, C)
    else:
        words = before.view(np.uint16), after.view(np.uint16), X.view(np.uint16)
        _core.cross_u16(*words, X.dtype == BFLOAT16, pairs, C)


def mirror(H: F64) -> None:
    """Copies the upper triangle of H into the lower one, in place."""
    _core.mirror(in_place("mirror", H, np.float64, np.shape(H)[:1] * 2))


def column_stats(
    X: npt.NDArray[Any], absolute: F64, abs_max: F32, minimum: F32, maximum: F32
) -> None:
    """Widens per-column sums of |x| and extremes (all (k,), in place) by the rows of X (t, k)."""
    X = floats("column_stats", X)
    k = X.shape[1:]
    in_place("column_stats", absolute, np.float64, k)
    for extreme in (abs_max, minimum, maximum):
        in_place("column_stats", extreme, np.float32, k)
    if X.dtype == np.float32:
        _core.column_stats_f32(X, absolute, abs_max, minimum, maximum)
    else:
        bf16 = X.dtype == BFLOAT16
        _core.column_stats_u16(X.view(np.uint16), bf16, absolute, abs_max, minimum, maximum)


def quadratic(E: F32, H: F64) -> float:
    """tr(E H E^T) for E (n, k) and symmetric H (k, k)."""
    E, H = matrix("quadratic", E, np.float32), matrix("quadratic", H, np.float64)
    return float(_core.quadratic(E, H))


def energy(x: F32) -> float:
    """Sum of squares of x (n, k), in float64: a float32 sum of millions loses four digits."""
    return float(np.einsum("ij,ij->", x, x, dtype=np.float64))


def relative_error(W: F32, q: QTensor, H: F64 | None = None) -> float:
    """tr(E H E^T) / tr(W H W^T) with E = W - Q; H = I where there is none, (B, k, k) for B equal
    blocks of rows. 0 for a zero matrix."""
    error, size = _energy(W - decode(q), H), _energy(W, H)
    return error / size if size > 0 else 0.0


def _energy(E: F32, H: F64 | None) -> float:
    if H is None:
        return energy(E)
    blocks = H.reshape(-1, *H.shape[-2:])
    rows = len(E) // len(blocks)
    return sum(quadratic(E[b * rows : (b + 1) * rows], part) for b, part in enumerate(blocks))
