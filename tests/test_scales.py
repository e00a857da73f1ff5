"""Scales beyond one number per group on an integer grid: tables, hardware's scale types, offsets,
steps shared by blocks of groups. Every op against its NumPy twin, as in test_ops.py.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from bitwright import ops, schemes
from bitwright.spec import InputError, QTensor, RefusedError, Scheme
from problems import FUSED, SHAPES, UNIT, assert_equal, groups_together, hessian, weights
from ref import to_step_grid
from ref.decode import decode
from ref.encode import encode
from ref.fit import fit
from ref.gptq import gptq
from ref.gptq_search import gptq_search
from ref.refine import damped, refine

NAMES = ["fp4-g16", "nf4-g16", "nf4-channel", "fp4-g10-e8m0", "fp4-g16-e4m3", "int3-g16-fp16"]
NAMES += ["int3-g16-offset", "int2-channel-offset-fp32", "int4-g16-offset-fp16-3x6"]
NAMES += ["int3-g10-fp16-4x4", "int2-g16-asym-2x8", "nf4-g16-fp16-3x6", "int1-g16-offset-fp16-2x2"]
FACTORS = np.array([1, 0.6, 0.9], np.float32)


def codes_of(s: Scheme) -> int:
    """The largest multiple of a step."""
    return int((1 << (s.scale_bits - s.symmetric)) - 1)


@pytest.mark.parametrize("name", NAMES)
def test_twin_of_every_op(name: str) -> None:
    """e4m3 with its global scale at 1; refinement's loss is float32 sums along k."""
    s = schemes.parse(name)
    table = None if s.grid.uniform else (s.grid.values, s.grid.middles)
    factors = ops.POWER_FACTORS if s.scale == "e8m0" else FACTORS
    for n, k, _ in SHAPES:
        W, H, g = weights(n, k, name), hessian(k, name), s.columns(k)
        weight, steps = H.diagonal().astype(np.float32), ops.block_steps(W, s)
        levels = None if steps is None else (steps, s.block, codes_of(s))
        side = (s.bits, g, s.symmetric, 0, s.scale)
        kind, more = (table, s.offset), {"whole": 1.0, "steps": steps}
        plain = ops.fit(W, s, **more)
        one = np.ones(1, np.float32)
        assert_equal(plain, fit(W, None, *side, 2.0, one, False, *kind, levels))
        best = ops.fit(W, s, weight, search=True, factors=factors, **more)
        assert_equal(best, fit(W, weight, *side, 2.0, factors, True, *kind, levels))
        q = ops.encode(W, *plain, s, **more)
        assert_equal([q.codes], [encode(W, *plain, g, s.bits, *kind)])
        value = decode(q.codes, *plain, g, *kind)
        assert_equal([ops.decode(q), q.dequantize()], [value, value])
        order = groups_together(k, g)
        R, _, _ = ops.factor(H, 0.01, order)
        swept, _ = ops.gptq(W, R, order, *best, s, **more)
        assert_equal([swept.codes], [gptq(W, R, order, *best, g, s.bits, FUSED, *kind)[0]])
        found, _ = ops.gptq_search(W, R, order, s, factors=factors, **more)
        tried = (g, s.bits, s.symmetric, 0, s.scale, factors, 1, False, FUSED)
        twin = gptq_search(W, R, order, *tried, *kind, levels)[:3]
        assert_equal([found.codes, found.scales, found.zeros], twin)
        dead, damping = np.zeros(k, bool), 0.01 * H.diagonal().mean()
        revised, loss = ops.refine(W, H, found, damping, pattern="clc")
        start = (found.codes, found.scales, found.zeros, FUSED)
        want = refine(W, H, dead, damping, g, s.bits, s.scale, "clc", 1e-4, *start, *kind, levels)
        assert_equal([revised.codes, revised.scales], want[:2])
        if s.offset:
            assert_equal([revised.zeros], [want[2]])
        if s.block:
            assert_equal([revised.steps], [want[3]])
        E, Hd = W - ops.decode(revised), damped(H, dead, damping)
        limit = 2 * (k + 2) * UNIT * np.sum((np.abs(E) @ np.abs(Hd)) * np.abs(E), 1)
        limit += UNIT * 20 * np.sum((np.abs(W) @ np.abs(Hd)) * np.abs(E), 1)
        assert np.all(np.abs(loss - np.sum((E.astype(float) @ Hd) * E, 1)) <= limit)


TWO = [name for name in NAMES if schemes.parse(name).block]


@pytest.mark.parametrize("name", TWO)
def test_scales_of_two_levels_are_multiples_of_their_steps(name: str) -> None:
    """1 .. codes times a step of the scale grid, and so are offsets, from 0 on, after every op."""
    s, W, H = schemes.parse(name), weights(40, 97, name), hessian(97, name)
    order = groups_together(97, s.group)
    R, _, _ = ops.factor(H, 0.01, order)
    q = ops.encode(W, *ops.fit(W, s), s)
    found, _ = ops.gptq_search(W, R, order, s, negative=s.symmetric)
    revised, _ = ops.refine(W, H, found, 0.01 * H.diagonal().mean())
    assert not np.array_equal(revised.steps, found.steps)
    for result in (q, found, revised):
        assert result.steps is not None
        assert np.array_equal(result.steps, to_step_grid(result.steps, s.scale))
        steps = np.repeat(result.steps, s.block, 1)
        G = s.groups(97)
        multiples = result.scales / steps[:, :G]
        assert np.array_equal(multiples, np.rint(multiples))
        assert np.abs(multiples).min() >= 1
        assert np.abs(multiples).max() <= codes_of(s)
        if s.offset:
            blocks = result.steps.shape[1] // 2
            multiples = result.zeros / np.repeat(result.steps[:, blocks:], s.block, 1)[:, :G]
            assert np.array_equal(multiples, np.rint(multiples))
            assert multiples.min() >= 0
            assert multiples.max() <= codes_of(s)


def test_steps_reach_the_small_numbers_of_fp16() -> None:
    """Weights whose steps are subnormal fp16 numbers keep their precision to the spacing there."""
    s = schemes.parse("int4-g16-offset-fp16-2x6")
    W = weights(20, 64, "small") / np.float32(200)
    steps = ops.block_steps(W, s)
    assert steps is not None
    assert 0 < steps.min() < 2.0**-15
    assert np.array_equal(steps, steps.astype(np.float16).astype(np.float32))
    error = np.abs(W - ops.decode(ops.encode(W, *ops.fit(W, s), s)))
    assert error.max() <= 0.1 * np.abs(W).max()
    nothing = ops.block_steps(np.zeros((2, 32), np.float32), s)
    assert nothing is not None
    assert nothing.min() > 0


def test_an_offset_is_worth_more_than_a_zero_point() -> None:
    """The same error relative to H with a finer zero: lower, and exact where all values fit."""
    W, H = weights(64, 128), hessian(128)
    R, order = ops.factor(H, 0.01)[0], np.arange(128, dtype=np.int32)
    found = {}
    for name in ("int3-g32-asym", "int3-g32-offset"):
        q, _ = ops.gptq_search(W, R, order, schemes.parse(name))
        q, _ = ops.refine(W, H, q, 0.01 * H.diagonal().mean())
        found[name] = ops.quadratic(W - ops.decode(q), H)
    assert found["int3-g32-offset"] < 0.95 * found["int3-g32-asym"]
    s = schemes.parse("int2-g4-offset-fp32")
    exact = np.float32([[-0.3, 0.1, 0.5, 0.9], [0.0, 0.25, 0.5, 0.75]])
    q = ops.encode(exact, *ops.fit(exact, s), s)
    np.testing.assert_allclose(ops.decode(q), exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["int4-g16-fp16-4x6", "int4-g16-asym-4x6", TWO[0]])
def test_a_group_of_zeros_leaves_its_block_alone(name: str) -> None:
    s, W = schemes.parse(name), weights(20, 96)
    zeros = W.copy()
    zeros[:, :16] = 0
    error = []
    for w in (W, zeros):
        q = ops.encode(w, *ops.fit(w, s), s)
        error.append(np.sum((w - ops.decode(q))[:, 16:] ** 2))
    assert error[1] < 1.5 * error[0]
    assert not ops.decode(ops.encode(zeros, *ops.fit(zeros, s), s))[:, :16].any()


def test_impossible_schemes_are_refused_however_they_are_made() -> None:
    good = schemes.parse("int4-g16-offset-fp16-4x6")
    for change in (
        {"block": 0}, {"scale_bits": 1}, {"scale": "fp32"}, {"scale": "e8m0"}, {"group": -1},
        {"symmetric": True}, {"grid": schemes.grids()["nf4"]},
    ):  # fmt: skip
        with pytest.raises(RefusedError, match=r"^\[scheme\] wanted .*, got "):
            dataclasses.replace(good, **change)


def test_bits_per_weight_and_names() -> None:
    """Those of GGUF's Q4_K, 144 bytes for 256 weights, and Q3_K, 110."""
    q4_k = schemes.parse("int4-g32-offset-fp16-8x6")
    assert q4_k.bits_per_weight(8, 256) == 8 * 144 / 256
    assert schemes.parse("int3-g16-fp16-16x6").bits_per_weight(8, 256) == 8 * 110 / 256
    assert schemes.parse("int4-g32-offset-fp16").bits_per_weight(8, 256) == 5.0
    for name in NAMES:
        assert schemes.parse(name).name == name
    for name, why in (
        ("nf4-g16-offset", "no zero points with a table, got nf4-g16-offset"),
        ("int4-g16-offset-e8m0", "bf16, fp16 or fp32 scales with offsets"),
        ("int4-channel-8x6", "groups for two-level scales"),
        ("int4-g16-fp32-8x6", "steps of bf16 or fp16"),
    ):
        with pytest.raises(RefusedError, match=why):
            schemes.parse(name)


def test_wrong_steps_and_zeros_are_refused() -> None:
    s = schemes.parse("int4-g16-offset-fp16-2x6")
    W = weights(6, 48)
    q = ops.encode(W, *ops.fit(W, s), s)
    with pytest.raises(
        InputError, match=r"steps must be \(6, 4\) in int4-g16-offset-fp16-2x6, got"
    ):
        QTensor(q.codes, q.scales, q.zeros, s)
    with pytest.raises(InputError, match="scales and offsets that are multiples of their steps"):
        QTensor(q.codes, q.scales, q.zeros, s, steps=1.01 * q.steps)
    with pytest.raises(InputError, match=r"\[fit\] steps must be 6 x 4, got 6 x 2"):
        ops.fit(W, s, steps=np.ones((6, 2), np.float32))
    with pytest.raises(InputError, match=r"\[fit\] steps must be positive and finite, got 0"):
        ops.fit(W, s, steps=np.zeros((6, 4), np.float32))
    with pytest.raises(InputError, match=r"\[encode\] wanted a 2-D array of float32, got .* uint8"):
        ops.encode(W, q.scales, np.zeros((6, 3), np.uint8), s)
