"""The sums over tokens and errors against their NumPy twins (tests/ref), as in test_ops.

Equal bits, but where bf16 is multiplied in pairs; there limits in units of u = 2^-24.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bitwright import ops
from bitwright.spec import InputError
from problems import (
    DOUBLE,
    FUSED,
    SHAPES,
    UNIT,
    assert_equal,
    hessian,
    inputs,
    quadratic_limit,
    rng,
    weights,
)
from ref.column_stats import column_stats
from ref.cross import cross
from ref.gram import gram
from ref.mirror import mirror
from ref.quadratic import quadratic

TOKENS = [(0, 5), (1, 1), (1, 50), (3, 400), (512, 24), (513, 13), (1100, 29), (600, 49)]
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def in_pairs(dtype: Any) -> bool:
    """Whether products of this dtype are summed in the order of the machine's own instruction."""
    return dtype == ml_dtypes.bfloat16 and ops.multiplies_bf16()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("t", "k"), TOKENS)
def test_twin_gram_and_mirror(t: int, k: int, dtype: Any) -> None:
    """Equal bits, but where bf16 pairs are multiplied as such; and the chain is within (chunk) u
    sum|x x'| + chunks 2^-53 of the exact sum."""
    X, H = inputs(t, k).astype(dtype), np.triu(hessian(k))
    want, wide = gram(X, H, FUSED), H.copy()
    ops.gram(X, wide, "float32")
    np.testing.assert_array_equal(np.triu(wide), np.triu(want))
    ops.gram(X, H)
    if not in_pairs(dtype):
        np.testing.assert_array_equal(np.triu(H), np.triu(want))
    ops.mirror(H)
    if not in_pairs(dtype):
        assert_equal([H], [mirror(want)])
    wide = X.astype(np.float64)
    limit = min(t, 512) * UNIT * (np.abs(wide).T @ np.abs(wide)) + (t // 512 + 2) * DOUBLE * abs(H)
    assert np.all(np.abs(H - mirror(np.triu(hessian(k))) - wide.T @ wide) <= 2 * limit)


def test_products_of_bf16_pairs_are_for_bf16_where_the_machine_has_them() -> None:
    X, H = inputs(40, 8), np.zeros((8, 8))
    for dtype in DTYPES:
        words = X.astype(dtype)
        if in_pairs(dtype):
            assert ops.products_of(dtype) == "bfloat16"
            sums = dict(zip((None, "bfloat16", "float32"), np.zeros((3, 8, 8)), strict=True))
            for products, found in sums.items():
                ops.gram(words, found, products)
            np.testing.assert_array_equal(sums[None], sums["bfloat16"])
            assert not np.array_equal(sums["bfloat16"], sums["float32"])  # another order of sums
            continue
        assert ops.products_of(dtype) == "float32"
        with pytest.raises(InputError, match=r"^\[sums\] wanted products of float32 or bfloat16"):
            ops.gram(words, H, "bfloat16")
        with pytest.raises(InputError, match=r"got 'bfloat16', .* and \w+"):
            ops.cross(words, words, H, products="bfloat16")
    with pytest.raises(InputError, match="got 'float16'"):
        ops.gram(X, H, "float16")


def test_gram_over_chunks_is_gram_of_all() -> None:
    """Splits at multiples of 512 tokens change no bit: each chunk is summed on its own."""
    X, whole = inputs(1700, 31), np.zeros((31, 31))
    ops.gram(X, whole)
    for cuts in ([512], [1024], [512, 1024, 1536], [0, 0, 1536, 1700]):
        H = np.zeros((31, 31))
        for part in np.split(X, cuts):
            ops.gram(part, H)
        np.testing.assert_array_equal(np.triu(H), np.triu(whole))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
def test_twin_column_stats(dtype: Any) -> None:
    for t, k in [*TOKENS, (3, 1030)]:
        X, g = inputs(t, k).astype(dtype), rng("column_stats", t, k)
        ours = [np.abs(g.normal(size=k)), *np.zeros((3, k), np.float32)]
        ours[2][:], ours[3][:] = np.inf, -np.inf
        want = column_stats(X, *ours)
        ops.column_stats(X, *ours)
        assert_equal(ours, want)
    ops.column_stats(np.zeros((3, 0), dtype), np.zeros(0), *np.zeros((3, 0), np.float32))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["fp16", "bf16"])
def test_every_16_bit_word_is_widened_exactly(dtype: Any) -> None:
    X = np.arange(65536, dtype=np.uint16).view(dtype)
    X = X[np.isfinite(X.astype(np.float32))][None]
    extremes = np.full((3, X.size), -np.inf, np.float32)
    extremes[1] = np.inf
    ops.column_stats(X, np.zeros(X.size), *extremes)
    assert_equal([extremes[1], extremes[2]], [X[0].astype(np.float32)] * 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("t", "k"), TOKENS)
def test_twin_cross(t: int, k: int, dtype: Any) -> None:
    """The drift of the inputs themselves; and of other columns, fewer or more."""
    X = inputs(t, k).astype(dtype)
    for h in (None, k, max(1, k // 3), k + 25):
        before = inputs(t, h or k, 1).astype(dtype)
        after = None if h is None else inputs(t, h, 2).astype(dtype)
        C = rng("cross", t, k).normal(size=(h or k, k))
        want, start = cross(before, X, C, FUSED, after), C.copy()
        ops.cross(before, X, C, after)
        wide = start.copy()
        ops.cross(before, X, wide, after, "float32")
        assert_equal([wide], [want])
        if not in_pairs(dtype):
            assert_equal([C], [want])
        b = X.astype(np.float64)
        a = before.astype(np.float64) - (b if after is None else after.astype(np.float64))
        unit = min(t, 512) * UNIT + (2.0**-8 if in_pairs(dtype) else UNIT)  # differences in bf16
        limit = unit * (np.abs(a).T @ np.abs(b)) + (t // 512 + 2) * DOUBLE * abs(C)
        assert np.all(np.abs(C - start - a.T @ b) <= 2 * limit)


def test_twin_quadratic() -> None:
    for n, k, _ in SHAPES:
        E, H = weights(n, k), hessian(k)
        assert abs(ops.quadratic(E, H) - quadratic(E, H)) <= quadratic_limit(E, H)
