"""Every C++ op against its NumPy twin (tests/ref), over shapes around the panels and blocks.

Codes, words, scales and zero points are equal, and so are the float results whose order of
operations is part of the contract (gram, qlinear, decode, the targets of gptq). The other floats
have limits in units of u = 2^-24 (float32) and 2^-53 (float64). All results are the same bytes for
every thread count and for the levels avx2 and avx512.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

import ref
from bitwright import ops
from bitwright.spec import InputError, NumericalError, QTensor, Scheme
from problems import (
    DOUBLE,
    FUSED,
    SHAPES,
    UNIT,
    assert_equal,
    groups_together,
    hessian,
    inputs,
    quadratic_limit,
    random_codes,
    rng,
    scheme,
    weights,
)
from ref.awq_clip import awq_clip
from ref.awq_scale import awq_scale, errors
from ref.chain import chain
from ref.decode import decode
from ref.drift import drift
from ref.encode import encode
from ref.factor import factor
from ref.fit import fit
from ref.gptq import gptq
from ref.gptq_search import gptq_search
from ref.pack import pack
from ref.qlinear import qlinear
from ref.refine import damped, refine
from ref.round_pack import round_pack
from ref.unpack import unpack
from ref.word_sum import word_sum

BITS = range(1, 9)
KINDS = list(product((True, False), ("group", "channel", "tensor")))


def scheme_of(bits: int, group: int, symmetric: bool, where: str, **more: Any) -> Scheme:
    return scheme(bits, {"group": group, "channel": 0, "tensor": -1}[where], symmetric, **more)


def test_fma_of_the_twins_is_exact() -> None:
    """Sums a hair off the middle of two float32, which rounding by way of float64 gets wrong."""
    a, low = np.float32(2.0**12 + 1), 2.0**24 + 2.0**13  # a a = low + 1, halfway to low + 2
    cases = [(a, 2.0**-40, low + 2), (a, -(2.0**-40), low), (a, 0.0, low)]
    cases += [(-a, -(2.0**-40), -low - 2), (-a, 2.0**-40, -low), (-a, 0.0, -low)]
    for b, c, want in cases:
        assert ref.fma(np.array([a]), b, np.float32(c))[0] == np.float32(want)


@pytest.mark.parametrize("bits", BITS)
def test_twin_pack_and_unpack(bits: int) -> None:
    for n, k, _ in [*SHAPES, (3, 32, 1), (2, 0, 1), (130, 33, 1)]:
        codes = rng("pack", n, k, bits).integers(0, 2**bits, (n, k), dtype=np.uint8)
        words = ops.pack(codes, bits)
        assert_equal([words], [pack(codes, bits)])
        assert_equal([ops.unpack(words, bits, k)], [unpack(words, bits, k)])
        assert_equal([ops.unpack(words, bits, k)], [codes])


GOLDEN = {  # q_i = (5 i + 1) mod 2^b, i = 0 .. 31, words in hexadecimal
    1: "55555555",
    2: "39393939 39393939",
    3: "f19d50f1 50f19d50 9d50f19d",
    4: "4fa50b61 c72d83e9 4fa50b61 c72d83e9",
    5: "f5582cc1 dc4dc927 6ed161c5 d9a3d450 e5e4d40f",
    6: "9540b181 3ba991f6 3070bde3 a581b591 3fb9d2fa 71748d20",
    7: "5202c301 29487cd1 13d70cd7 eb51991e bf565c16 00ff79e9 385c90d1",
    8: "100b0601 241f1a15 38332e29 4c47423d 605b5651 746f6a65 88837e79 9c97928d",
}


@pytest.mark.parametrize("bits", BITS)
def test_pack_golden_words(bits: int) -> None:
    codes = ((5 * np.arange(32) + 1) % 2**bits).astype(np.uint8)[None]
    assert [f"{w:08x}" for w in ops.pack(codes, bits)[0]] == GOLDEN[bits].split()
    assert [f"{w:08x}" for w in pack(codes, bits)[0]] == GOLDEN[bits].split()


def difficult_weights(n: int, k: int, *seed: object) -> np.ndarray:
    """Some rows all zero, constant, of one sign, tiny, or with one huge weight."""
    W = weights(n, k, *seed)
    for row, values in enumerate((0, 0.75, np.abs(W[0]), -np.abs(W[0]), 1e-7 * W[0])):
        if row + 1 < n:
            W[row + 1] = values
    W[n // 2, k // 2] = 3e4
    return W


@pytest.mark.parametrize(("symmetric", "where"), KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_twin_fit_encode_decode(bits: int, symmetric: bool, where: str) -> None:
    grids = {"scale": ("bf16", "fp16", "fp32")[bits % 3], "zero_min": bits % 2}
    for n, k, g in SHAPES:
        s = scheme_of(bits, g, symmetric, where, **grids)
        W = difficult_weights(n, k, bits)
        scales, zeros = ops.fit(W, s)
        ends = np.array([[W.min(), W.max()]]) if where == "tensor" else W
        side = (None, bits, s.columns(ends.shape[1]), symmetric, s.zero_min, s.scale, 2.0)
        twin = fit(ends, *side, np.ones(1, np.float32), False)
        rows = n if where == "tensor" else 1
        assert_equal((scales, zeros), [np.repeat(x, rows, 0) for x in twin])
        q = ops.encode(W, scales, zeros, s)
        assert_equal([q.codes], [encode(W, scales, zeros, s.columns(k), bits)])
        value = decode(q.codes, scales, zeros, s.columns(k))
        assert_equal([ops.decode(q), q.dequantize()], [value, value])


@pytest.mark.parametrize(("symmetric", "where"), [kind for kind in KINDS if kind[1] != "tensor"])
@pytest.mark.parametrize("bits", BITS)
def test_twin_round_pack(bits: int, symmetric: bool, where: str) -> None:
    grids = {"scale": ("bf16", "fp16", "e8m0")[bits % 3], "zero_min": bits % 2}
    for (n, k, g), dtype in product(SHAPES, (np.float32, np.float16, ops.BFLOAT16)):
        s = scheme_of(bits, g, symmetric, where, **grids)
        W = difficult_weights(n, k, bits).astype(dtype)
        ours = ops.round_pack(W, s)
        assert_equal(ours, round_pack(W, bits, s.columns(k), symmetric, s.zero_min, s.scale))
        wide = W.astype(np.float32)
        scales, zeros = ops.fit(wide, s)
        codes = ops.encode(wide, scales, zeros, s).codes
        assert_equal(ours, [ops.pack(codes, bits), scales, zeros])


def test_round_pack_refuses_other_schemes() -> None:
    for other in (scheme(4, -1), scheme(4, 8, scale="e4m3"), scheme(4, 8, False, offset=True)):
        with pytest.raises(InputError, match="plain integer scheme by group or channel"):
            ops.round_pack(weights(4, 16), other)


@pytest.mark.parametrize("power", [2.0, 2.4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_twin_fit_search(bits: int, symmetric: bool, power: float) -> None:
    for n, k, g in SHAPES:
        s = scheme(bits, g, symmetric, scale=("bf16", "fp16", "fp32")[bits % 3], zero_min=bits % 2)
        W = difficult_weights(n, k, bits, power)
        weight = None if power == 2.4 else hessian(k, bits).diagonal().astype(np.float32)
        ours = ops.fit(W, s, weight, search=True, power=power)
        side = (weight, bits, s.columns(k), symmetric, s.zero_min, s.scale, power)
        assert_equal(ours, fit(W, *side, ops.SEARCH_FACTORS, True))


@pytest.mark.parametrize("size", [1e13, 7e16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_twin_fit_where_every_score_overflows(symmetric: bool, size: float) -> None:
    """The first candidate is taken, on the scale grid like every other."""
    W = weights(5, 40, size)
    W[2, 7], W[3, 8] = size, -size
    weight = np.full(40, 1e16, np.float32)
    for s in (scheme(4, 16, symmetric, scale=grid) for grid in ("bf16", "fp16", "fp32")):
        with np.errstate(over="ignore"):
            twin = fit(W, weight, 4, 16, symmetric, 0, s.scale, 2.0, ops.SEARCH_FACTORS, True)
        assert_equal(ops.fit(W, s, weight, search=True), twin)


@pytest.mark.parametrize("k", [1, 2, 47, 49, 96, 97, 145, 400])
def test_twin_factor(k: int) -> None:
    """Backward error: |R R^T - A|_ij <= c sqrt(a_ii a_jj), c = 2 u for the float32 entries and
    (k + 2) 2^-53 for the Cholesky. Forward: NMSE <= (2 u)^2, A is well conditioned."""
    H, g = hessian(k), rng("factor", k)
    order, dead = g.permutation(k).astype(np.int32), g.random(k) < 0.1
    R, damping, rung = ops.factor(H, 0.01, order, dead)
    mean = H.diagonal()[~dead].mean() if not dead.all() else 1.0
    want = factor(H, order, dead, 0.01 * mean)
    assert (damping, rung) == (0.01, 0)
    assert np.all(np.tril(R, -1) == 0)
    assert np.sum((R - want) ** 2) <= (2 * UNIT) ** 2 * np.sum(want**2)
    A = want_matrix(H, order, dead, 0.01 * mean)
    d = np.sqrt(A.diagonal())
    R64 = R.astype(np.float64)
    assert np.all(np.abs(R64 @ R64.T - A) <= (2 * UNIT + (k + 2) * DOUBLE) * np.outer(d, d))


def want_matrix(H: np.ndarray, order: np.ndarray, dead: np.ndarray, damping: float) -> np.ndarray:
    A = H[np.ix_(order, order)] + damping * np.eye(len(H))
    live = ~dead[order]
    return np.where(np.outer(live, live), A, damping * np.eye(len(H)))


@pytest.mark.parametrize("k", [2, 60, 200])
def test_factor_refuses_what_is_not_positive_definite(k: int) -> None:
    H = hessian(k)
    H[0, -1] = H[-1, 0] = 1e9 * H.max()
    with pytest.raises(NumericalError, match=r"not positive definite with relative damping 0\.01"):
        ops.factor(H)
    assert factor(H, np.arange(k), np.zeros(k, bool), 1e3 * H.diagonal().mean()) is None


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_twin_gptq(bits: int, symmetric: bool) -> None:
    """Codes equal; the loss is a float32 sum over 48 columns at a time: 50 u relative."""
    for n, k, g in SHAPES:
        s, W, H = scheme(bits, g, symmetric), weights(n, k, bits), hessian(k, bits)
        order = rng("order", k, bits).permutation(k).astype(np.int32)
        R, _, _ = ops.factor(H, 0.01, order)
        grid = ops.fit(W, s, search=True)
        q, loss = ops.gptq(W, R, order, *grid, s)
        codes, want = gptq(W, R, order, *grid, s.columns(k), bits, FUSED)
        assert_equal([q.codes], [codes])
        np.testing.assert_allclose(loss, want, rtol=50 * UNIT)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_twin_gptq_search(bits: int, symmetric: bool) -> None:
    """Codes, scales and zero points equal: losses are compared as the same float32 sums."""
    negative, span = symmetric and bits % 2 == 0, 1 + bits % 2
    for n, k, g in SHAPES:
        s = scheme(bits, g, symmetric, scale=("bf16", "fp16", "fp32")[bits % 3], zero_min=bits % 2)
        W, H, group = weights(n, k, bits), hessian(k, bits), s.columns(k)
        order = groups_together(k, group)
        R, _, _ = ops.factor(H, 0.01, order)
        factors = np.array([1.0, 0.6, 0.9, 1.05], np.float32)
        options = {"factors": factors, "zero_span": span, "negative": negative}
        q, loss = ops.gptq_search(W, R, order, s, **options)
        side = (group, bits, symmetric, s.zero_min, s.scale, factors, span, negative)
        codes, scales, zeros, want = gptq_search(W, R, order, *side, FUSED)
        assert_equal([q.codes, q.scales, q.zeros], [codes, scales, zeros])
        np.testing.assert_allclose(loss, want, rtol=50 * UNIT)


@pytest.mark.parametrize("pattern", ["c", "l", "ccclclc"])
@pytest.mark.parametrize("bits", BITS)
def test_twin_refine(bits: int, pattern: str) -> None:
    """The last shape has three spans of columns, and rows of H in more than one part."""
    for n, k, g in [*SHAPES, (60, 530, 64)]:
        s = scheme(bits, g, bits % 2 == 0, scale=("bf16", "fp16", "fp32")[bits % 3])
        W, H, dead = weights(n, k, bits), hessian(k, bits), rng("dead", k).random(k) < 0.1
        scales, zeros = ops.fit(W, s)
        scales[::3] *= -1 if s.symmetric else 1
        start = ops.encode(W, scales, zeros, s)
        damping = 0.01 * H.diagonal().mean()
        q, loss = ops.refine(W, H, start, damping, dead, pattern=pattern)
        side = (s.columns(k), bits, s.scale, pattern, 1e-4, start.codes, scales, zeros)
        assert_equal([q.codes, q.scales], refine(W, H, dead, damping, *side, FUSED)[:2])
        E, Hd = W - q.dequantize(), damped(H, dead, damping)
        limit = 2 * (k + 2) * UNIT * np.sum((np.abs(E) @ np.abs(Hd)) * np.abs(E), 1)
        limit += UNIT * 20 * np.sum((np.abs(W) @ np.abs(Hd)) * np.abs(E), 1)
        assert np.all(np.abs(loss - np.sum((E.astype(float) @ Hd) * E, 1)) <= limit)


def test_twin_drift() -> None:
    for n, k, _ in SHAPES:
        W, H, C = weights(n, k), hessian(k), hessian(k, "other") - hessian(k)
        order = rng("order", k).permutation(k).astype(np.int32)
        R, _, _ = ops.factor(H, 0.01, order)
        assert_equal([ops.drift(W, C, R, order)], [drift(W, C, R, order, FUSED)])
        D = weights(n, k, "stream").astype(np.float64)
        assert_equal([ops.drift(W, C, R, order, D)], [drift(W, C, R, order, FUSED, D)])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_twin_awq(bits: int, symmetric: bool) -> None:
    for n, k, g in SHAPES:
        s, W, H = scheme(bits, g, symmetric), weights(n, k, bits), hessian(k, bits)
        side = (bits, s.columns(k), symmetric, s.zero_min, s.scale)
        assert_equal(ops.awq_clip(W, H, s), awq_clip(W, H, *side, ops.CLIP_FACTORS))
        column_scales = rng("awq", k).uniform(0.2, 5, (4, k)).astype(np.float32)
        error = ops.awq_scale(W, H, column_scales, s) - awq_scale(W, H, column_scales, *side)
        limit = [quadratic_limit(errors(W, c, *side), H) for c in column_scales]
        assert np.all(np.abs(error) <= limit)


@pytest.mark.parametrize("bits", BITS[1:])
def test_twin_ties_are_rounded_alike_in_every_op(bits: int) -> None:
    """Weights half-way between codes, an odd zero point, a scale that is a power of two."""
    top, zero, s = 2**bits - 1, 2 ** (bits - 1) - 1, scheme(bits, 0, symmetric=False)
    levels = np.arange(-zero, top - zero + 1).astype(np.float32)
    between = [levels[:-1] + np.float32(part) for part in (0.25, 0.5)]
    W = np.concatenate([levels, *between])[None] / 8
    grid, k = ops.fit(W, s), W.shape[1]
    assert_equal(grid, (np.float32([[0.125]]), np.uint8([[zero]])))
    codes = encode(W, *grid, k, bits)
    order = np.arange(k, dtype=np.int32)
    q, _ = ops.gptq(W, np.eye(k, dtype=np.float32), order, *grid, s)
    assert_equal([ops.encode(W, *grid, s).codes, q.codes], [codes, codes])
    H, one, side = hessian(k, "ties"), np.ones((1, k), np.float32), (bits, k, False, 0, s.scale)
    error = ops.awq_scale(W, H, one, s) - awq_scale(W, H, one, *side)
    assert np.all(np.abs(error) <= quadratic_limit(errors(W, one[0], *side), H))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_twin_qlinear(bits: int, symmetric: bool) -> None:
    for (n, k, g), t in product(SHAPES, (0, 1, 9)):
        s = scheme(bits, g, symmetric)
        q = QTensor(*random_codes(n, k, s), s)
        X = inputs(t, k)
        want = qlinear(X, q.codes, q.scales, q.zeros, s.columns(k), FUSED)
        assert_equal([ops.qlinear(X, q)], [want])


@pytest.mark.parametrize("rows", [1, 3])
def test_twin_chain(rows: int) -> None:
    x = rng("chain", rows).standard_normal((rows, 2 * ops.CHAINS)).astype(np.float32)
    assert_equal([ops.chain(x, 7, 0.9, 0.3)], [chain(x, 7, 0.9, 0.3, fused=FUSED)])
    whole = np.rint(64 * x.astype(np.float64))  # small integers: every step is exact
    assert_equal([ops.chain(whole, 7, -2.0, 5.0)], [chain(whole, 7, -2.0, 5.0)])
    if not ops.isa().endswith("bf16"):
        with pytest.raises(InputError, match="no product of bf16 pairs"):
            ops.chain(x, 7, 1.0, 1.0, pairs=True)
        return
    small = whole.astype(np.float32)
    assert_equal([ops.chain(small, 7, 3.0, -2.0, pairs=True)], [chain(small, 7, 3.0, -2.0, True)])
    assert_equal([ops.chain(x, 0, 3.0, -2.0)], [x])


def test_chain_refuses_part_of_a_block() -> None:
    with pytest.raises(InputError, match="multiple of 384 columns, got 383"):
        ops.chain(np.ones((1, 383), np.float32), 1, 1.0, 1.0)
    with pytest.raises(InputError, match="rounds from 0 on, got -1"):
        ops.chain(np.ones((1, 384), np.float32), -1, 1.0, 1.0)


@pytest.mark.parametrize(("rows", "count"), [(0, 5), (1, 0), (1, 1), (3, 63), (5, 64), (2, 1001)])
def test_twin_word_sum(rows: int, count: int) -> None:
    x = rng("words", rows, count).integers(0, 2**64, (rows, count), np.uint64)
    assert_equal([ops.word_sum(x)], [word_sum(x)])
