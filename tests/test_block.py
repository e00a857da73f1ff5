"""Decoder blocks in one call, against their twin: every head count, width and dtype; tokens at once
or one by one, on any number of threads, give the same bits."""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

from bitwright import ops, schemes
from bitwright.spec import InputError, QTensor
from problems import FUSED, assert_equal, random_codes, rng, threads
from ref.blocks import blocks as twin
from ref.head import head

BF16 = np.dtype(ml_dtypes.bfloat16)
EPSILON = 1e-5


class Shape(NamedTuple):
    """hidden, heads, kv_heads, width, inner"""

    hidden: int
    heads: int
    kv_heads: int
    width: int
    inner: int

    @property
    def matrices(self) -> list[tuple[int, int]]:
        h, q, k, m = self.hidden, self.heads * self.width, self.kv_heads * self.width, self.inner
        return [(q, h), (k, h), (k, h), (h, q), (m, h), (m, h), (h, m)]


SHAPES = [
    Shape(32, 4, 2, 8, 64),
    Shape(48, 3, 1, 64, 80),
    Shape(40, 2, 2, 80, 33),
    Shape(64, 6, 1, 18, 100),
    Shape(16, 20, 1, 6, 20),
]


class Case:
    """A random block, its inputs and its twin."""

    def __init__(
        self, s: Shape, mode: Any = "exact", norms: bool = True, biased: bool = True,
        rotary: bool = True, activations: Any = "group",
    ) -> None:  # fmt: skip
        g, scheme = rng("block", s, norms, biased), schemes.parse("int4-g32-asym")
        codes = [random_codes(n, k, scheme, i) for i, (n, k) in enumerate(s.matrices)]
        self.shape, self.mode, self.activations, self.rotary = s, mode, activations, rotary
        self.packed = tuple(ops.pack_linear(QTensor(*c, scheme)) for c in codes)
        self.gains = [g.uniform(0.5, 1.5, n).astype(np.float32) for n in (s.hidden,) * 2]
        self.gains += [g.uniform(0.5, 1.5, s.width).astype(np.float32) for _ in range(2 * norms)]
        self.biases = [
            (0.3 * g.standard_normal(n)).astype(np.float32) * biased for n, _ in s.matrices
        ]
        self.scale = s.width**-0.5

    @property
    def block(self) -> ops.DecoderBlock:
        s = self.shape
        biases = np.concatenate(self.biases) if any(b.any() for b in self.biases) else np.zeros(0)
        return ops.DecoderBlock(
            self.packed, np.concatenate(self.gains), biases.astype(np.float32), s.heads, s.kv_heads,
            EPSILON, self.scale, self.rotary, self.mode, self.activations,
        )  # fmt: skip

    def product(self, i: int, x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float32)
        return ops.linear(x, self.packed[i], mode=self.mode, activations=self.activations)

    def twin(self, x, cos, sin, keys, values, seen):
        gains = [*self.gains, None, None][:4]
        turns = (cos, sin) if self.rotary else (None, None)
        products = [lambda x, i=i: self.product(i, x) for i in range(7)]
        return twin(
            x, products, self.biases, gains, self.shape.heads, EPSILON, self.scale, *turns,
            keys, values, seen,
        )  # fmt: skip


def turns(width: int, first: int, t: int) -> tuple[np.ndarray, np.ndarray]:
    angle = np.arange(first, first + t)[:, None] / 10.0 ** (np.arange(width // 2) / width)
    both = np.concatenate([angle, angle], 1)
    return np.cos(both).astype(np.float32), np.sin(both).astype(np.float32)


def store(s: Shape, batch: int, room: int, dtype: Any = np.float32) -> Any:
    g = rng("store", s, batch, room)
    arrays = [g.standard_normal((batch, s.kv_heads, room, s.width)).astype(dtype) for _ in "kv"]
    return arrays, ops.KeyValues(*arrays)


def causal(t: int, past: int) -> np.ndarray:
    return np.arange(past + t) <= past + np.arange(t)[:, None]


def close(ours: np.ndarray, want: np.ndarray, units: float) -> None:
    """Within so many units of the largest: sums of that many terms were rounded on the way."""
    ours = ours.astype(np.float64)
    assert np.abs(ours - want).max() <= units * np.abs(want).max()


@pytest.mark.parametrize("s", SHAPES, ids=str)
@pytest.mark.parametrize(("t", "past"), [(1, 0), (1, 5), (1, 37), (7, 0), (4, 33), (50, 3)])
def test_twin_blocks(s, t, past):
    for norms, biased, rotary in ((True, True, True), (False, False, True), (False, True, False)):
        case = Case(s, norms=norms, biased=biased, rotary=rotary)
        x = rng("x", s, t).standard_normal((t, s.hidden)).astype(np.float32)
        cos, sin = turns(s.width, past, t)
        (keys, values), kept = store(s, 1, past + t + 3)
        before = keys[0, :, :past].copy(), values[0, :, :past].copy()
        after = keys[0, :, past + t :].copy()
        y = ops.blocks(x, [case.block], cos, sin, [kept], past=past)
        want, k, v = case.twin(x, cos, sin, *before, causal(t, past))
        close(y, want, 2e-5)
        close(keys[0, :, : past + t], k, 2e-6)
        close(values[0, :, : past + t], v, 2e-6)
        assert_equal([keys[0, :, past + t :]], [after])


@pytest.mark.parametrize("activations", ["group", "token"])
@pytest.mark.parametrize("s", SHAPES, ids=str)
def test_fast_mode_uses_the_fast_products(s, activations):
    """A code of the activations may fall on the other side of a tie: 1/127 of some product."""
    case = Case(s, "fast", activations=activations)
    x = rng("x", s).standard_normal((3, s.hidden)).astype(np.float32)
    cos, sin = turns(s.width, 4, 3)
    (keys, values), kept = store(s, 1, 7)
    before = keys[0, :, :4].copy(), values[0, :, :4].copy()
    y = ops.blocks(x, [case.block], cos, sin, [kept], past=4)
    close(y, case.twin(x, cos, sin, *before, causal(3, 4))[0], 2e-3)
    exact = Case(s).block
    assert not np.array_equal(y, ops.blocks(x, [exact], cos, sin, [kept], past=4))


@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=str)
@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("s", SHAPES, ids=str)
def test_tokens_one_by_one_or_at_once_on_any_threads(s, mode, dtype):
    """Also through two blocks in one call or in two; the same bits each time."""
    cases = [Case(s, mode), Case(s, mode, norms=False)]
    t = 21
    x = rng("x", s).standard_normal((t, s.hidden)).astype(dtype)
    cos, sin = (one.astype(dtype) for one in turns(s.width, 0, t))
    (keys, values), first = store(s, 1, t, dtype)
    second = store(s, 1, t, dtype)[1]
    through = [case.block for case in cases]
    want = ops.blocks(x, through, cos, sin, [first, second])
    known = keys.copy(), values.copy()
    for n in (1, 2, 3):
        with threads(n):
            (keys, values), first = store(s, 1, t, dtype)
            second = store(s, 1, t, dtype)[1]
            assert_equal([ops.blocks(x, through, cos, sin, [first, second])], [want])
            assert_equal([keys, values], known)
            for begin, end in ((0, 8), (8, 9), (9, 21)):
                part = slice(begin, end)
                args = cos[part], sin[part]
                y = ops.blocks(x[part], through[:1], *args, [first], past=begin)
                y = ops.blocks(y, through[1:], *args, [second], past=begin)
                assert_equal([y], [want[part]])
    assert want.dtype == dtype


def test_a_batch_with_padding():
    """Masked keys count for nothing, a token that sees none attends to nothing."""
    s, t, past = SHAPES[0], 5, 2
    case, g = Case(s), rng("batch")
    x = g.standard_normal((2 * t, s.hidden)).astype(np.float32)
    cos, sin = turns(s.width, past, t)
    both = np.concatenate([cos, cos[::-1]]), np.concatenate([sin, sin[::-1]])
    (keys, values), kept = store(s, 2, past + t + 9)
    before = keys[:, :, :past].copy(), values[:, :, :past].copy()
    seen = np.stack([causal(t, past), causal(t, past)])
    seen[1, :, :4] = False
    mask = seen.reshape(2 * t, past + t).astype(np.uint8)
    y = ops.blocks(x, [case.block], *both, [kept], batch=2, past=past, mask=mask)
    for b in range(2):
        rows = slice(b * t, (b + 1) * t)
        old = before[0][b], before[1][b]
        want = case.twin(x[rows], both[0][rows], both[1][rows], *old, seen[b])
        close(y[rows], want[0], 2e-5)
        close(keys[b, :, : past + t], want[1], 2e-6)


def test_what_is_not_finite_shows():
    s = SHAPES[0]
    x = rng("x").standard_normal((3, s.hidden)).astype(np.float32)
    x[1, 3] = np.nan
    cos, sin = turns(s.width, 0, 3)
    y = ops.blocks(x, [Case(s).block], cos, sin, [store(s, 1, 3)[1]])
    assert np.isfinite(y[0]).all()
    assert not np.isfinite(y[1]).any()


def test_refusals():
    s = SHAPES[0]
    case = Case(s)
    x, (cos, sin) = np.ones((2, s.hidden), np.float32), turns(s.width, 0, 2)
    kept = store(s, 1, 2)[1]
    good: dict[str, Any] = {
        "x": x, "through": [case.block], "cos": cos, "sin": sin, "stores": [kept],
    }  # fmt: skip
    for change, sentence in (
        ({"x": x[:, :-1]}, "x must have 32 columns, got 31"),
        ({"x": x.astype(np.float64)}, "wanted x of float32 or bfloat16"),
        ({"x": x.astype(BF16)}, "stores of its dtype"),
        ({"stores": []}, "wanted blocks and as many stores, got 1 and 0"),
        ({"cos": cos[:1]}, "cos and sin must be 2 or 2 x 8, got 1 x 8"),
        ({"sin": sin[:, :6]}, "cos and sin must be 2 or 2 x 8, got 2 x 6"),
        ({"past": 1}, "keys and values must have room for 6 rows of 8, got 4 of 8"),
        ({"past": -1}, "after 0 or more tokens"),
        ({"batch": 3}, "wanted x of 3 sequences alike"),
        ({"mask": np.ones((2, 3), np.uint8)}, "mask must be 2 x 2, got 2 x 3"),
    ):
        with pytest.raises(InputError, match=sentence):
            ops.blocks(**{**good, **change})
    for change, sentence in (
        ({"matrices": case.packed[:6]}, "wanted q, k, v, o, gate, up and down, got 6"),
        ({"matrices": case.packed[::-1]}, "must be"),
        ({"heads": 3}, "wanted heads that divide 32 rows"),
        ({"gains": np.ones(60, np.float32)}, "gains must be 64 or 80, got 60"),
        ({"biases": np.ones(9, np.float32)}, "biases must be 0 or"),
    ):
        settings = {
            "matrices": case.packed, "gains": np.ones(64, np.float32), "heads": 4, "kv_heads": 2,
            "biases": np.zeros(0, np.float32), "epsilon": EPSILON, "scale": 1.0, **change,
        }  # fmt: skip
        with pytest.raises(InputError, match=sentence):
            ops.DecoderBlock(**settings)
    for shape in ((2, 2, 8), (1, 2, 2, 8, 1)):
        with pytest.raises(InputError, match=r"wanted keys \(batch, heads, room, width\)"):
            ops.KeyValues(np.ones(shape, np.float32), np.ones(shape, np.float32))
    with pytest.raises(InputError, match="array of float32"):
        ops.KeyValues(np.ones((1, 2, 2, 8), np.float32), np.ones((1, 2, 2, 9), np.float32))


@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 32), (49, 40), (100, 250), (9, 17)])
def test_twin_head(n, k, dtype):
    g = rng("head", n, k)
    W = g.standard_normal((n, k)).astype(BF16)
    for t in (1, 2, 5):
        X = g.standard_normal((t, k)).astype(dtype)
        for count in (1, 2):
            with threads(count):
                assert_equal([ops.head(X, W)], [head(X, W, FUSED).astype(dtype)])
    with pytest.raises(InputError, match="to match W"):
        ops.head(X[:, :-1], W)
    with pytest.raises(InputError, match="wanted X of float32 or bfloat16"):
        ops.head(X.astype(np.float64), W)
    with pytest.raises(InputError, match="array of bfloat16"):
        ops.head(X, W.astype(np.float32))
