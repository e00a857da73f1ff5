"""y = x W^T on panels: packing against its twin, exact mode `==` the chain, fast mode `==` the twin
of its integer arithmetic and within the bound of int8 activations from exact.

Shapes: rows and columns that fill no panel, no strip, no group; tokens around tiles of 4 and 13
(test_many_tokens: of 8).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bitwright import ops, schemes
from bitwright.spec import InputError, QTensor, RefusedError, Scheme
from problems import FUSED, UNIT, as_words, assert_equal, inputs, random_codes, rng, threads
from ref.dot_chain import dot_chain
from ref.linear import fast, linear, parts_of, stands_out, step
from ref.pack_linear import pack_linear
from ref.qlinear import qlinear
from ref.unpack_linear import unpack_linear

NAMES = [
    *(f"int{bits}-g32" for bits in range(1, 9)),
    *(f"int{bits}-g64-asym" for bits in (2, 3, 4, 8)),
    *("int4-channel", "int3-channel-asym", "int8-channel", "int4-tensor", "int2-g16", "int3-g16"),
    *(
        "int4-g128-fp16",
        "int4-g10-asym",
        "int3-g48-fp32",
        "int4-g64-offset",
        "int3-g32-offset-fp16",
    ),
    *("int8-g32-offset-fp32", "nf4-g64", "fp4-g32", "mxfp4", "nvfp4", "int4-g32-offset-fp16-8x6"),
]
SHAPES = [(1, 1), (5, 7), (16, 32), (17, 145), (49, 576), (100, 250)]
TOKENS = (1, 2, 3, 4, 5, 12, 13, 29)
WORDS = {"bf16": ml_dtypes.bfloat16, "e8m0": ml_dtypes.bfloat16, "fp16": np.float16}


def quantized(n: int, k: int, scheme: Scheme) -> QTensor:
    codes, scales, zeros = random_codes(n, k, scheme)
    if scheme.block:
        blocks = -(-scheme.groups(k) // scheme.block)
        steps = np.full((n, 2 * blocks), 2.0**-12, np.float32)
        units = np.float32(2.0**-12)
        return QTensor(
            codes,
            np.rint(scales / units) * units,
            np.rint(zeros / units) * units,
            scheme,
            1.0,
            steps,
        )
    return QTensor(codes, scales, zeros, scheme, 2.0**12 if scheme.scale == "e4m3" else 1.0)


def table_of(scheme: Scheme) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    return None if scheme.grid.uniform else (scheme.grid.values, scheme.grid.middles)


def stored(scheme: Scheme) -> tuple[int, Any, str]:
    """Width of a code, dtype of scales, kind of zero points."""
    width = 4 if not scheme.grid.uniform else {1: 2, 2: 2, 3: 3, 4: 4}.get(scheme.bits, 8)
    words = np.float32 if scheme.block else WORDS.get(scheme.scale, np.float32)
    return width, words, "offsets" if scheme.offset else "middle" if scheme.symmetric else "bytes"


def tokens(t: int, k: int) -> np.ndarray:
    X = inputs(t, k)
    X[0, : k // 3] = 0  # a segment of nothing
    X[1::2, k // 2] *= 50  # one that stands out, in every other token
    return X


def side(q: QTensor) -> tuple[Any, ...]:
    return q.codes, q.scales, q.zeros, q.scheme.columns(q.shape[1])


@pytest.mark.parametrize("name", NAMES)
def test_twin_pack_and_unpack(name: str) -> None:
    s = schemes.parse(name)
    width, words, kind = stored(s)
    for n, k in SHAPES:
        q = quantized(n, k, s)
        packed = ops.pack_linear(q)
        group = s.columns(k)
        assert_equal([packed.panels], [pack_linear(*side(q), width, words, kind)])
        back = ops.unpack_linear(packed)
        middle = 2 ** (s.bits - 1) if s.grid.uniform else 0
        twin = unpack_linear(packed.panels, n, k, group, width, words, kind, middle)
        assert_equal(twin[:1], [q.codes])
        assert_equal([back.codes, back.scales, back.zeros], [q.codes, q.scales, q.zeros])
        np.testing.assert_array_equal(twin[1], q.scales)
        np.testing.assert_array_equal(twin[2], q.zeros)


@pytest.mark.parametrize("name", NAMES)
def test_twin_linear_exact(name: str) -> None:
    """Equal to the chain of the dequantized weights; within k u sum |x w| of the exact product."""
    s = schemes.parse(name)
    for n, k in SHAPES:
        q = quantized(n, k, s)
        packed, W = ops.pack_linear(q), q.dequantize().astype(np.float64)
        for t in TOKENS[:: 1 if n < 49 else 3]:
            X = tokens(t, k)
            Y = ops.linear(X, packed)
            assert_equal([Y], [linear(X, *side(q), FUSED, table_of(s), s.offset)])
            size = np.abs(X).astype(np.float64) @ np.abs(W).T
            assert np.all(np.abs(Y - X.astype(np.float64) @ W.T) <= 2 * (k + 1) * UNIT * size)


@pytest.mark.parametrize("per_token", [False, True], ids=["group", "token"])
@pytest.mark.parametrize("name", NAMES)
def test_twin_linear_fast(name: str, per_token: bool) -> None:
    s = schemes.parse(name)
    for n, k in SHAPES:
        q = quantized(n, k, s)
        packed = ops.pack_linear(q)
        for t in TOKENS[:: 1 if n < 49 else 3]:
            X = tokens(t, k)
            Y = ops.linear(X, packed, mode="fast", activations="token" if per_token else "group")
            want = fast(X, *side(q), s.bits, per_token, FUSED, table_of(s), s.offset)
            assert_equal([Y], [want])
            assert np.all(np.abs(Y - ops.linear(X, packed)) <= bound(X, q, per_token))


@pytest.mark.parametrize("per_token", [False, True], ids=["group", "token"])
@pytest.mark.parametrize("name", [*NAMES, "int3-g144", "int4-g640", "int4-g1040-asym"])
def test_many_tokens_are_many_times_few(name: str, per_token: bool) -> None:
    """Panels in pairs, blocks of about 512 columns, 128 tokens at a time: where a level takes them
    so, the bits are those of a few tokens; blocks that end inside a group and that begin with an
    odd strip, rows that leave a panel without another, threads."""
    s = schemes.parse(name)
    how: dict[str, Any] = {"mode": "fast", "activations": "token" if per_token else "group"}
    for n, k in ((49, 2200), (80, 530)):
        packed, X = ops.pack_linear(quantized(n, k, s)), tokens(150, k)
        few = [ops.linear(X[t : t + 6], packed, **how) for t in range(0, len(X), 6)]
        for count in (1, 2, 3):
            with threads(count):
                assert_equal([ops.linear(X, packed, **how)], [np.concatenate(few)])
        for t in (14, 17, 33):
            assert_equal([ops.linear(X[:t], packed, **how)], [np.concatenate(few)[:t]])


def bound(X: np.ndarray, q: QTensor, per_token: bool) -> np.ndarray:
    """sum_j |w_j| d_j / 2, d a 254th where there is a second digit, of nf4 also |x_j| scale / 254;
    and float32 rounding."""
    k, group = q.shape[1], q.scheme.columns(q.shape[1])
    W = np.abs(q.dequantize().astype(np.float64))
    if q.scheme.offset:
        scales, zeros = (np.repeat(v, group, 1)[:, :k] for v in (q.scales, q.zeros))
        rough = np.abs(q.codes * scales) + np.abs(zeros)
    else:
        rough = 2.0**q.scheme.bits * np.repeat(np.abs(q.scales), group, 1)[:, :k]
    d = np.repeat(step(X), k, 1)
    if not per_token:
        parts = [part for _, part in parts_of(k, group, 128)]
        steps = [step(X[:, part]) for part in parts]
        for part, one, finer in zip(parts, steps, stands_out(steps), strict=True):
            d[:, part] = np.where(finer, one / np.float32(254), one)
    limit = d.astype(np.float64) @ W.T / 2
    if q.scheme.grid.name == "nf4":
        limit += (np.abs(X) + d) @ np.repeat(q.scales, group, 1)[:, :k].T / 254
    return limit + 4 * (k + 8) * UNIT * ((np.abs(X) + d).astype(np.float64) @ rough.T) + 1e-30


def test_a_segment_that_stands_out_has_a_second_digit() -> None:
    """Alone or beside tokens without: the same bits, and the error of a step 254 times as small."""
    q = quantized(48, 576, schemes.parse("int4-g64"))
    packed, X = ops.pack_linear(q), inputs(33, 576)
    X /= np.abs(X).max(1, keepdims=True)
    X[5, 100] = 300  # the only one whose squared step is more than 4 times the mean of the others
    X[7, 200], X[7, 300] = 300, 300  # both are
    X[8, ::64] = 300  # none is
    alone = [ops.linear(X[t : t + 1], packed, mode="fast") for t in range(len(X))]
    assert_equal([ops.linear(X, packed, mode="fast")], [np.concatenate(alone)])
    W = q.dequantize().astype(np.float64)
    error = np.abs(np.concatenate(alone) - X.astype(np.float64) @ W.T).max(1) / np.abs(W).max()
    assert max(error[5], error[7]) < 0.1
    assert error[8] > 1


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_bfloat16_is_widened_and_rounded_once(mode: Any) -> None:
    q = quantized(37, 100, schemes.parse("int4-g64"))
    packed = ops.pack_linear(q)
    for t in TOKENS:
        X = inputs(t, 100).astype(ml_dtypes.bfloat16)
        wide = ops.linear(X.astype(np.float32), packed, mode=mode)
        assert_equal([ops.linear(X, packed, mode=mode, dtype=np.float32)], [wide])
        assert_equal([ops.linear(X, packed, mode=mode)], [wide.astype(ml_dtypes.bfloat16)])


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_several_matrices_in_one_call(mode: Any) -> None:
    """Of unequal rows, widths and groups: each as if it were alone."""
    names = ["int4-g64", "int4-g64-asym", "int8-channel", "int3-g32", "nf4-g32"]
    rows = (576, 30, 192, 1, 17)
    packed = [
        ops.pack_linear(quantized(n, 320, schemes.parse(s)))
        for n, s in zip(rows, names, strict=True)
    ]
    for n in (1, 2, 3):
        for t in (1, 4, 30):
            X = inputs(t, 320)
            with threads(n):
                together = ops.linear(X, packed, mode=mode)
            assert_equal(together, [ops.linear(X, one, mode=mode) for one in packed])
            assert all(y.flags.c_contiguous for y in together)
    assert ops.linear(X, [], mode=mode) == []
    assert ops.linear(X[:0], packed[0], mode=mode).shape == (0, 576)


def test_exact_is_qlinear() -> None:
    q = quantized(97, 145, schemes.parse("int4-g64-asym"))
    X = inputs(9, 145)
    assert_equal([ops.linear(X, ops.pack_linear(q))], [ops.qlinear(X, q)])
    assert_equal([ops.qlinear(X, q)], [qlinear(X, *side(q), FUSED)])


class Read:
    """Words that are read when they are asked for, all in the same memory."""

    def __init__(self, words: np.ndarray) -> None:
        self.words, self.shape, self.asked = words, words.shape, list[int]()
        self.memory = np.empty_like(words)

    def __getitem__(self, rows: slice) -> np.ndarray:
        found = self.words[rows]
        self.asked.append(len(found))
        self.memory[:] = 0xFFFFFFFF
        self.memory[: len(found)] = found
        return self.memory[: len(found)]


@pytest.mark.parametrize("name", NAMES)
def test_packed_codes_make_the_same_panels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, two panels at a time, from an array and from what reads one."""
    s = schemes.parse(name)
    for n, k in (*SHAPES, (33, 96), (35, 300)):
        q = quantized(n, k, s)
        want, words = ops.pack_linear(q), as_words(q)
        for piece in (1 << 20, 2 * 16 * words.words.shape[1] * 4):
            monkeypatch.setattr(sys.modules["bitwright.ops.linear"], "PIECE", piece)
            with threads(1):
                assert_equal([ops.pack_linear(words).panels], [want.panels])
                read = Read(words.words)
                packed = ops.pack_linear(replace(words, words=read))
            assert_equal([packed.panels], [want.panels])
            assert len(read.asked) == (-(-n // 32) if piece < 1 << 20 else 1)
            assert sum(read.asked) == n
        assert (packed.global_scale, packed.steps is None) == (q.global_scale, q.steps is None)
        assert_equal([ops.unpacked(words).codes], [q.codes])


def test_packed_codes_into_rows_of_a_matrix() -> None:
    q = quantized(70, 100, schemes.parse("int3-g32-asym"))
    into = ops.PackedMatrix.empty(q.scheme, q.shape)
    for row in range(0, 70, 32):
        rows = slice(row, min(row + 32, 70))
        part = QTensor(q.codes[rows], q.scales[rows], q.zeros[rows], q.scheme)
        ops.pack_linear(as_words(part), into, row)
    assert_equal([into.panels], [ops.pack_linear(q).panels])


def test_what_packed_codes_must_be() -> None:
    words = as_words(quantized(20, 100, schemes.parse("int3-g32-asym")))
    for bad in (words.words[:, 1:], words.words[:0], words.words[0]):
        with pytest.raises(
            InputError, match=r"wanted words \(n, 10\) for 100 codes in a row in int"
        ):
            replace(words, words=bad)
    with pytest.raises(
        InputError, match=r"scales and zeros must be \(20, 4\) for codes \(20, 100\)"
    ):
        replace(words, scales=words.scales[1:])
    with pytest.raises(InputError, match="a 2-D array of uint32, got 2-D of int64"):
        ops.pack_linear(replace(words, words=words.words.astype(np.int64)))
    with pytest.raises(InputError, match="scales must be bf16 numbers, got nan"):
        ops.pack_linear(replace(words, scales=words.scales * np.float32(np.nan)))
    turned = replace(words, words=np.asfortranarray(words.words))
    turned.words.flags.writeable = False
    assert_equal([ops.pack_linear(turned).panels], [ops.pack_linear(words).panels])
    high = replace(words, zeros=words.zeros.astype(np.float32))
    with pytest.raises(InputError, match="a 2-D array of uint8, got 2-D of float32"):
        ops.pack_linear(high)


def test_rows_packed_a_few_at_a_time() -> None:
    q = quantized(70, 100, schemes.parse("int3-g32-asym"))
    into = ops.PackedMatrix.empty(q.scheme, q.shape)
    assert into.panels.ctypes.data % 64 == 0
    for row in range(0, 70, 32):
        rows = slice(row, min(row + 32, 70))
        part = QTensor(q.codes[rows], q.scales[rows], q.zeros[rows], q.scheme)
        assert ops.pack_linear(part, into, row) is into
    assert_equal([into.panels], [ops.pack_linear(q).panels])
    for rows, row in ((part, 8), (part, 96), (QTensor(*side(q)[:3], q.scheme), 16)):
        with pytest.raises(InputError, match=r"wanted rows of \(70, 100\) from a multiple of 16"):
            ops.pack_linear(rows, into, row)
    other = quantized(70, 100, schemes.parse("int3-g32"))
    with pytest.raises(InputError, match="wanted rows in int3-g32-asym, got int3-g32"):
        ops.pack_linear(other, into)


@pytest.mark.parametrize("k", [576, 1024, 4096])
@pytest.mark.parametrize("name", ["int2-g32-asym", "int3-g64", "int4-g64", "int4-g128", "int8-g32"])
def test_panels_are_hardly_larger_than_the_codes_and_scales(name: str, k: int) -> None:
    s = schemes.parse(name)
    panels, size = ops.PackedMatrix.panel_shape(s, (4096, k))
    assert panels * size <= 1.1 * s.bits_per_weight(4096, k) * 4096 * k / 8


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_what_is_not_finite_shows(mode: Any, value: float) -> None:
    packed = ops.pack_linear(quantized(20, 200, schemes.parse("int4-g64")))
    for t in (1, 6):
        for activations in ("group", "token"):
            X = inputs(t, 200)
            X[-1, 130] = value
            Y = ops.linear(X, packed, mode=mode, activations=activations)
            assert not np.isfinite(Y[-1]).any()
            assert np.isfinite(Y[:-1]).all()


@pytest.mark.parametrize("rows", [1, 3])
def test_twin_dot_chain(rows: int) -> None:
    x = rng("dot_chain", rows).integers(-99, 99, (rows, 2 * ops.CHAINS), np.int32)
    for code, byte in ((15, -127), (0, 5), (7, 127)):
        assert_equal([ops.dot_chain(x, 11, code, byte)], [dot_chain(x, 11, code, byte)])
    for rounds, code, byte in ((-1, 1, 1), (1, 16, 1), (1, 1, 128)):
        with pytest.raises(InputError, match="wanted rounds from 0 on, a code of 0 to 15 and"):
            ops.dot_chain(x, rounds, code, byte)
    with pytest.raises(InputError, match="x must have a multiple of 384 columns, got 383"):
        ops.dot_chain(np.ones((1, 383), np.int32), 1, 1, 1)


def test_refusals() -> None:
    s = schemes.parse("int4-g64")
    q = quantized(20, 130, s)
    packed, X = ops.pack_linear(q), inputs(3, 130)
    for bad in (X.astype(np.float64), X.astype(np.float16)):
        with pytest.raises(InputError, match="wanted X of float32 or bfloat16"):
            ops.linear(bad, packed)
    with pytest.raises(InputError, match=r"X must be t x 130 to match W \(20 x 130\), got 3 x 129"):
        ops.linear(X[:, :-1], packed)
    with pytest.raises(InputError, match="mode exact or fast and activations group or token"):
        ops.linear(X, packed, mode="quick")  # type: ignore[call-overload]
    for panels in (packed.panels[:-1], packed.panels[:, :-64], packed.panels.view(np.int8)):
        with pytest.raises(InputError, match="wanted contiguous panels uint8"):
            ops.PackedMatrix(panels, s, q.shape)
    for damaged, sentence in (
        ({"codes": q.codes + np.uint8(16)}, "codes must fit in 4 bits"),
        ({"scales": q.scales + np.float32(1e-6)}, "scales must be bf16 numbers"),
        ({"scales": q.scales * np.nan}, "scales must be bf16 numbers, got nan"),
        ({"zeros": q.zeros + np.uint8(1)}, "zeros must all be 8 in a symmetric scheme, got 9"),
    ):
        arrays = {"codes": q.codes, "scales": q.scales, "zeros": q.zeros, **damaged}
        with pytest.raises(InputError, match=sentence):
            ops.pack_linear(QTensor(**arrays, scheme=s))


def test_a_table_of_many_levels_is_refused() -> None:
    grid = type(schemes.grids()["nf4"])("nf5", 5, tuple(float(v * abs(v)) for v in range(-16, 16)))
    with pytest.raises(RefusedError, match="a table of at most 16 levels, got nf5"):
        ops.PackedMatrix.panel_shape(Scheme(grid, 32), (16, 64))
