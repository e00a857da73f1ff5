"""The door to the core: what each op of bitwright.ops does with arrays that are not what it wants.

Every array argument of every op is damaged in turn. Strided, transposed and read-only inputs give
the right answer; a wrong dtype, ndim or shape and a bad value are refused with one sentence that
says what was wanted and what came; an array that is added to in place is never copied in silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import test_block as block
from bitwright import ops
from bitwright.calib.stats import StatsCollector
from bitwright.spec import InputError, QTensor
from problems import hessian, inputs, random_codes, scheme, threads, weights
from test_levels import declared

N, K, T = 5, 12, 7
ASYM = scheme(4, 8, symmetric=False)
CODES, SCALES, ZEROS = random_codes(N, K, ASYM)
W, X, H = weights(N, K), inputs(T, K), hessian(K)
R = ops.factor(H)[0]
ORDER = np.arange(K, dtype=np.int32)
COLUMN = np.linspace(0.5, 2, K, dtype=np.float32)
CHAINS = np.ones((2, ops.CHAINS), np.float32)
SUMMED = np.ones((2, ops.CHAINS), np.int32)
WORDS_READ = np.arange(N * K, dtype=np.uint64).reshape(N, K)
PACKED = ops.pack_linear(QTensor(CODES, SCALES, ZEROS, ASYM))
SUMS = {
    "absolute": np.zeros(K),
    "abs_max": np.zeros(K, np.float32),
    "minimum": np.zeros(K, np.float32),
    "maximum": np.zeros(K, np.float32),
}


@dataclass(frozen=True)
class Case:
    """A call with named arrays; `sums` are the ones it adds to in place and returns nothing for."""

    call: Callable[..., Any]
    arrays: dict[str, np.ndarray]
    sums: dict[str, np.ndarray] | None = None
    free: tuple[str, ...] = ()  # arguments whose number of rows is free

    def __call__(self, **changed: Any) -> list[np.ndarray]:
        sums = {name: x.copy() for name, x in (self.sums or {}).items()}
        result = self.call(**{**self.arrays, **sums, **changed})
        if sums:
            return [changed.get(name, x) for name, x in sums.items()]
        parts = result if isinstance(result, tuple) else (result,)
        return [np.asarray(p.codes if isinstance(p, QTensor) else p) for p in parts]


def quantized(call: Callable[..., Any]) -> Callable[..., Any]:
    def run(codes: Any, scales: Any, zeros: Any, **more: Any) -> Any:
        return call(**more, q=QTensor(codes, scales, zeros, ASYM))

    return run


Q = {"codes": CODES, "scales": SCALES, "zeros": ZEROS}
GRID = {"scales": SCALES, "zeros": ZEROS}
CASES: dict[str, Case] = {
    "pack": Case(lambda codes: ops.pack(codes, 4), {"codes": CODES}, free=("codes",)),
    "unpack": Case(lambda words: ops.unpack(words, 4, K), {"words": ops.pack(CODES, 4)}),
    "fit": Case(
        lambda W, weight, factors: ops.fit(W, ASYM, weight, search=True, factors=factors),
        {"W": W, "weight": COLUMN, "factors": ops.SEARCH_FACTORS},
        free=("W", "factors"),
    ),
    "round_pack": Case(lambda W: ops.round_pack(W, ASYM), {"W": W}, free=("W",)),
    "encode": Case(lambda W, scales, zeros: ops.encode(W, scales, zeros, ASYM), {"W": W, **GRID}),
    "decode": Case(quantized(ops.decode), Q),
    "gram": Case(ops.gram, {"X": X}, {"H": np.triu(H)}),
    "mirror": Case(ops.mirror, {}, {"H": np.triu(H)}),
    "column_stats": Case(ops.column_stats, {"X": X}, SUMS),
    "factor": Case(
        lambda H, order, dead: ops.factor(H, 0.01, order, dead),
        {"H": H, "order": ORDER, "dead": ORDER == 3},
    ),
    "gptq": Case(
        lambda **arrays: ops.gptq(**arrays, scheme=ASYM), {"W": W, "R": R, "order": ORDER, **GRID}
    ),
    "gptq_search": Case(
        lambda **arrays: ops.gptq_search(**arrays, scheme=ASYM),
        {"W": W, "R": R, "order": ORDER, "factors": ops.FEEDBACK_FACTORS},
        free=("W", "factors"),
    ),
    "refine": Case(
        lambda W, H, dead, **q: quantized(ops.refine)(W=W, H=H, damping=0.01, dead=dead, **q),
        {"W": W, "H": H, "dead": ORDER == 3, **Q},
    ),
    "drift": Case(ops.drift, {"W": W, "C": H, "R": R, "order": ORDER}, free=("W",)),
    "cross": Case(ops.cross, {"before": X + 1, "X": X}, {"C": H}),
    "quadratic": Case(ops.quadratic, {"E": W, "H": H}, free=("E",)),
    "awq_scale": Case(
        lambda **arrays: ops.awq_scale(**arrays, scheme=ASYM),
        {"W": W, "H": H, "column_scales": np.stack([COLUMN, COLUMN[::-1]])},
        free=("W", "column_scales"),
    ),
    "awq_clip": Case(
        lambda **arrays: ops.awq_clip(**arrays, scheme=ASYM),
        {"W": W, "H": H, "factors": ops.CLIP_FACTORS},
        free=("W", "factors"),
    ),
    "qlinear": Case(quantized(ops.qlinear), {"X": X, **Q}, free=("X",)),
    "chain": Case(lambda x: ops.chain(x, 3, 0.5, 1.0), {"x": CHAINS}, free=("x",)),
    "word_sum": Case(ops.word_sum, {"x": WORDS_READ}, free=("x",)),
    "dot_chain": Case(lambda x: ops.dot_chain(x, 3, 5, -7), {"x": SUMMED}, free=("x",)),
    "pack_linear": Case(lambda **q: quantized(ops.pack_linear)(**q).panels, Q),
    "unpack_linear": Case(
        lambda panels: ops.unpack_linear(
            ops.PackedMatrix(np.ascontiguousarray(panels), ASYM, (N, K))
        ),
        {"panels": PACKED.panels},
    ),
    "linear": Case(lambda X: ops.linear(X, PACKED), {"X": X}, free=("X",)),
    "head": Case(lambda X: ops.head(X, W.astype(ops.BFLOAT16)), {"X": X}, free=("X",)),
    "blocks": Case(
        lambda **arrays: ops.blocks(
            **arrays,
            through=[block.Case(block.SHAPES[0]).block],
            stores=[block.store(block.SHAPES[0], 1, T)[1]],
        ),
        {
            "x": inputs(T, block.SHAPES[0].hidden),
            **dict(zip(("cos", "sin"), block.turns(block.SHAPES[0].width, 0, T), strict=True)),
            "mask": np.tril(np.ones((T, T), np.uint8)),
        },
    ),
}
INPUTS = [(op, name) for op, case in CASES.items() for name in case.arrays]
OUTPUTS = [(op, name) for op, case in CASES.items() for name in case.sums or {}]
WORDS = {("gram", "X"), ("column_stats", "X")}  # take any of three dtypes


def test_every_op_has_a_case() -> None:
    assert set(CASES) == declared()


def refused(op: str, **changed: Any) -> str:
    """The sentence with which the op refuses; it says what was wanted and what came."""
    with pytest.raises(InputError, match=r"wanted|must") as caught:
        CASES[op](**changed)
    sentence = str(caught.value)
    assert re.search(r"\bgot\b", sentence), sentence
    assert len(sentence) < 300
    assert "\n" not in sentence
    return sentence


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True))


def strided(x: np.ndarray) -> np.ndarray:
    """Every second column (entry) of a wider array."""
    wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def row_slice(x: np.ndarray) -> np.ndarray:
    """The first columns of a wider array."""
    wide = np.zeros((*x.shape[:-1], x.shape[-1] + 3), x.dtype)
    wide[..., :-3] = x
    return wide[..., :-3]


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


def backwards(x: np.ndarray) -> np.ndarray:
    return x[::-1].copy()[::-1]


LAYOUTS = [strided, row_slice, read_only, backwards, np.asfortranarray]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("op", "name"), INPUTS)
def test_layouts_of_inputs_change_nothing(op: str, name: str, layout: Any) -> None:
    case = CASES[op]
    assert same(case(**{name: layout(case.arrays[name])}), case())


@pytest.mark.parametrize(("op", "name"), INPUTS)
def test_wrong_dtype(op: str, name: str) -> None:
    x = CASES[op].arrays[name]
    if (op, name) == ("factor", "order"):
        assert same(CASES[op](order=x.astype(np.int64)), CASES[op]())
        x = x.astype(np.float64)
    other = np.int64 if x.dtype.kind in "uib" else np.longdouble
    sentence = refused(op, **{name: x.astype(other)})
    assert str(np.dtype(other)) in sentence
    swapped = x.astype(x.dtype.newbyteorder())
    if x.dtype.itemsize > 1:
        refused(op, **{name: swapped})


@pytest.mark.parametrize(("op", "name"), [i for i in INPUTS if i[1] not in Q or i[0] == "encode"])
def test_wrong_ndim(op: str, name: str) -> None:
    x = CASES[op].arrays[name]
    for other in (x[None], x[0]):
        assert f"got {other.ndim}-D" in refused(op, **{name: other})


@pytest.mark.parametrize(("op", "name"), INPUTS)
def test_wrong_shape(op: str, name: str) -> None:
    x, case = CASES[op].arrays[name], CASES[op]
    wrong = [np.concatenate([x, x[..., -9:]], -1), x[..., : x.shape[-1] // 2]]
    if x.ndim == 2 and (name not in case.free) and (op, name) not in {*WORDS, ("unpack", "words")}:
        wrong += [np.concatenate([x, x[-1:]]), x[:0]]
    if op in ("pack", "word_sum", "round_pack") or name == "factors":
        wrong = []  # any matrix, any number of factors
    for other in wrong:
        refused(op, **{name: other})


@pytest.mark.parametrize(("op", "name"), OUTPUTS)
def test_sums_are_added_to_in_place_or_refused(op: str, name: str) -> None:
    case = CASES[op]
    x = (case.sums or {})[name]
    layouts = [f for f in LAYOUTS if x.ndim == 2 or f not in (row_slice, np.asfortranarray)]
    for layout in layouts:
        damaged = layout(x)
        before = damaged.copy()
        sentence = refused(op, **{name: damaged})
        assert ("read-only" if layout is read_only else "strided") in sentence
        assert np.array_equal(damaged, before)
    other = np.float32 if x.dtype == np.float64 else np.float64
    wrong = [x.astype(other), x[None], np.concatenate([x, x[:1]]), x.tolist()]
    wrong += [x[:-1], x[1:, :-1]] if x.ndim == 2 and op != "mirror" else []
    for damaged in wrong:
        refused(op, **{name: damaged})


NANS = [
    ("fit", "W"),
    ("fit", "weight"),
    ("fit", "factors"),
    ("round_pack", "W"),
    ("encode", "W"),
    ("encode", "scales"),
    ("factor", "H"),
    ("gptq", "W"),
    ("gptq", "R"),
    ("gptq", "scales"),
    ("gptq_search", "W"),
    ("gptq_search", "R"),
    ("gptq_search", "factors"),
    ("refine", "W"),
    ("refine", "H"),
    ("refine", "scales"),
    ("drift", "W"),
    ("drift", "C"),
    ("drift", "R"),
    ("quadratic", "E"),
    ("quadratic", "H"),
    ("awq_scale", "W"),
    ("awq_scale", "H"),
    ("awq_scale", "column_scales"),
    ("awq_clip", "W"),
    ("awq_clip", "H"),
    ("awq_clip", "factors"),
    ("pack_linear", "scales"),
]
PASSED_ON = {("decode", "scales"), ("qlinear", "scales"), ("qlinear", "X"), ("linear", "X"), *WORDS}
PASSED_ON |= {("cross", "before"), ("cross", "X"), ("chain", "x"), ("head", "X")}
PASSED_ON |= {("blocks", "x"), ("blocks", "cos"), ("blocks", "sin")}


def test_every_float_input_has_an_answer_to_nan() -> None:
    floats = {(op, name) for op, name in INPUTS if CASES[op].arrays[name].dtype.kind == "f"}
    assert floats == {*NANS, *PASSED_ON}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(("op", "name"), NANS)
def test_nan_is_refused(op: str, name: str, n: int) -> None:
    x = CASES[op].arrays[name].copy()
    x[..., -1] = np.nan
    with threads(n):
        assert name in refused(op, **{name: x})


@pytest.mark.parametrize(("op", "name"), sorted(PASSED_ON))
def test_nan_is_passed_on(op: str, name: str) -> None:
    x = CASES[op].arrays[name].copy()
    x[0, -1] = np.nan
    assert np.isnan(CASES[op](**{name: x})[0]).any()


def test_stats_refuse_nan_and_no_tokens() -> None:
    bad = X.copy()
    bad[1, 3] = np.nan
    with pytest.raises(InputError, match="wanted finite inputs, got NaN or infinity in column 3"):
        StatsCollector(K).update(bad).finish()
    with pytest.raises(InputError, match="wanted at least one token, got none"):
        StatsCollector(K).update(X[:0]).finish()


@pytest.mark.parametrize("infinite", [np.inf, -np.inf])
def test_infinite_weights_saturate_in_encode_only(infinite: float) -> None:
    bad = W.copy()
    bad[2, 3] = infinite
    assert CASES["encode"](W=bad)[0][2, 3] == (15 if infinite > 0 else 0)
    for op in ("fit", "gptq", "awq_clip", "awq_scale"):
        assert "W must be finite" in refused(op, W=bad)


def test_values_that_cannot_be_used() -> None:
    zero = SCALES.copy()
    zero[1, 1] = 0
    for op in ("encode", "gptq", "refine"):
        assert "scales must not be 0, got 0 at (1, 1)" in refused(op, scales=zero)
    for op, value in (("factor", 3), ("gptq", K), ("gptq_search", K), ("drift", 3)):
        order = ORDER.copy()
        order[5] = value
        assert f"permutation of 0 .. {K - 1}, got {value}" in refused(op, order=order)
    flat = R.copy()
    flat[4, 4] = 0
    for op in ("gptq", "gptq_search", "drift"):
        assert "R must have a positive diagonal, got 0 at 4" in refused(op, R=flat)
    apart = ORDER[[0, 1, 2, 3, 8, 4, 5, 6, 7, 9, 10, 11]]
    sentence = "keep the columns of each group together, got column 8 at 4 among those of group 0"
    assert sentence in refused("gptq_search", order=apart)
    start = QTensor(CODES, SCALES, ZEROS, ASYM)
    with pytest.raises(InputError, match="H must have a positive diagonal, got 0 at 5"):
        ops.refine(W, H * (ORDER != 5), start, 0.0)
    for damping in (-0.1, np.nan, np.inf):
        with pytest.raises(InputError, match="damping must be finite and at least 0"):
            ops.refine(W, H, start, damping)
    with pytest.raises(InputError, match="pattern must consist of c and l, got cx"):
        ops.refine(W, H, start, 0.01, pattern="cx")
    assert "got code 200" in refused("refine", codes=CODES + np.uint8(200 - CODES[0, 0]))
    assert "column_scales must be positive" in refused("awq_scale", column_scales=0 * X)
    for bits in (-1, 0, 9):
        for call in (ops.pack, lambda c, b: ops.unpack(ops.pack(c, 4), b, K)):
            with pytest.raises(InputError, match=f"wanted 1 to 8 bits, got {bits}"):
                call(CODES, bits)
    for damping in (-0.1, np.nan, np.inf):
        with pytest.raises(InputError, match="damping >= 0"):
            ops.factor(H, damping)
    for call in (lambda W: ops.fit(W, ASYM), lambda W: ops.awq_clip(W, H[:0, :0], ASYM)):
        with pytest.raises(InputError, match="at least one column, got none"):
            call(W[:, :0])
    for op in ("awq_clip", "gptq_search"):
        assert "at least 1 entry, got 0" in refused(op, factors=COLUMN[:0])
    assert "weight of 12 entries, got 0" in refused("fit", weight=COLUMN[:0])


@pytest.mark.parametrize("n", [1, 3])
def test_an_exception_in_a_parallel_region_arrives(n: int) -> None:
    codes = np.zeros((1000, 40), np.uint8)
    codes[[3, 500, 999], 7] = 16
    with threads(n):
        for _ in range(20):
            with pytest.raises(InputError, match=r"code 16 at \(\d+, 7\) does not fit in 4 bits"):
                ops.pack(codes, 4)
        codes[:] = 15
        assert np.all(ops.pack(codes, 4) == 0xFFFFFFFF)
    with pytest.raises(InputError, match="wanted at least 1 thread, got 0"):
        ops.set_threads(0)
