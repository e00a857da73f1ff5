"""Every number format and scheme: all codes, ties, signs, saturation, names, worked examples.

A grid is walked through registry.names("grids"): decode(all codes) -> encode gives the same codes
on every zero point and on scales from the smallest to the largest; a tie takes the even integer.
"""

from __future__ import annotations

from itertools import product

import ml_dtypes
import numpy as np
import pytest

from bitwright import ops, registry, schemes
from bitwright.spec import Grid, InputError, QTensor, RefusedError, Scheme
from problems import random_codes, rng, scheme

GRIDS = sorted(schemes.grids().values(), key=lambda grid: grid.bits)
UNIFORM = [grid for grid in GRIDS if grid.uniform]
TABLES = [grid for grid in GRIDS if not grid.uniform]
SCALES = np.array([2.0**-14, 0.00123, 0.75, 1.0, 3.1415925, 65280.0], np.float32)
WHERE = (-1, 0, 1, 3, 32, 64, 128, 4096)


def names() -> list[str]:
    every = product(GRIDS, WHERE, (True, False), ("bf16", "fp16", "fp32", "e8m0", "e4m3"))
    schemes_there_are = [
        Scheme(grid, group, symmetric, scale)
        for grid, group, symmetric, scale in every
        if (symmetric or grid.uniform) and not (group == -1 and scale == "e4m3")
    ]
    return [s.name for s in schemes_there_are]


def test_every_grid_module_lists_grids_under_their_names() -> None:
    listed = [registry.get("grids", name).GRIDS for name in registry.names("grids")]
    assert sum(len(grids) for grids in listed) == len(GRIDS)
    assert all(grid.name == name for grids in listed for name, grid in grids.items())
    assert {grid.bits for grid in GRIDS} == set(range(1, 9))


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.name)
def test_grid_is_sorted_and_fits_its_bits(grid: Grid) -> None:
    assert list(grid.values) == sorted(set(grid.values))
    assert len(grid.values) <= 2**grid.bits <= 256
    assert np.array_equal(np.float32(grid.values), np.array(grid.values))


def all_codes(grid: Grid, scale: np.float32) -> QTensor:
    """Row z: every code of the grid on the zero point z."""
    n = len(grid.values)
    codes = np.tile(np.arange(n, dtype=np.uint8), (n, 1))
    zeros = np.arange(n, dtype=np.uint8)[:, None]
    return QTensor(codes, np.full((n, 1), scale), zeros, Scheme(grid, 0, False))


@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize("grid", UNIFORM, ids=lambda g: g.name)
def test_all_codes_come_back(grid: Grid, scale: np.float32) -> None:
    q = all_codes(grid, scale)
    again = ops.encode(q.dequantize(), q.scales, q.zeros, q.scheme)
    assert np.array_equal(again.codes, q.codes)
    assert np.array_equal(ops.decode(q), q.dequantize())
    assert np.array_equal(
        ops.unpack(ops.pack(q.codes, grid.bits), grid.bits, len(q.codes)), q.codes
    )


@pytest.mark.parametrize("grid", UNIFORM, ids=lambda g: g.name)
def test_ties_go_to_the_even_integer(grid: Grid) -> None:
    """At (m + 1/2) s the signed integer next to it that is even wins, whatever the zero point."""
    top, s = 2**grid.bits - 1, np.float32(0.25)
    for zero in range(top + 1):
        halves = np.arange(-zero, top - zero, dtype=np.float32) + np.float32(0.5)
        even = 2 * np.round(halves / 2)
        grids = np.full((1, 1), s), np.array([[zero]], np.uint8)
        if len(halves):
            q = ops.encode(halves[None] * s, *grids, Scheme(grid, 0, False))
            assert np.array_equal(q.codes[0], even + zero)


@pytest.mark.parametrize("grid", UNIFORM, ids=lambda g: g.name)
def test_zeros_of_both_signs_and_saturation(grid: Grid) -> None:
    top = 2**grid.bits - 1
    W = np.array([[0.0, -0.0, 1e9, -1e9, np.inf, -np.inf, 1e-45, -1e-45]], np.float32)
    for zero in range(top + 1):
        grids = np.ones((1, 1), np.float32), np.array([[zero]], np.uint8)
        q = ops.encode(W, *grids, Scheme(grid, 0, False))
        assert q.codes.tolist() == [[zero, zero, top, 0, top, 0, zero, zero]]
        beyond = np.float32([[top - zero + 0.5, -zero - 0.5, top - zero + 1, -zero - 1]])
        q = ops.encode(beyond, *grids, Scheme(grid, 0, False))
        assert q.codes.tolist() == [[top, 0, top, 0]]
        assert not np.signbit(ops.decode(QTensor(grids[1], *grids, Scheme(grid, 0, False)))).any()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("grid", UNIFORM, ids=lambda g: g.name)
def test_unsearched_scales_span_the_range(grid: Grid, symmetric: bool) -> None:
    """Rounded scales move an end by at most half a bf16 step, 2^-9 of the range; then the error is
    at most half a step everywhere but below the zero point of absmax's one-sided 1-bit grid."""
    W, s = (
        rng("span", grid.bits).normal(size=(40, 64)).astype(np.float32),
        Scheme(grid, 16, symmetric),
    )
    if grid.bits == 1 and symmetric:
        W = -np.abs(W)  # codes 0 and 1 are -s and 0
    scales, zeros = ops.fit(W, s)
    step = np.repeat(scales, 16, 1)
    error = np.abs(W - ops.decode(ops.encode(W, scales, zeros, s)))
    assert np.all(error <= step * (0.5 + (2**grid.bits - 1) * 2.0**-8))
    assert np.array_equal(scales, scales.astype(np.float16).astype(np.float32))


def test_every_scheme_name_round_trips() -> None:
    for name in names():
        s = schemes.parse(name)
        assert s.name == name
        assert s == schemes.parse(s.name)
    assert len(set(names())) == len(names())


UNKNOWN = [
    "",
    "int4",
    "int9-g64",
    "int0-g64",
    "fp5-g32",
    "mxfp5",
    "int4-g64-e5m2",
    "int4-g0",
    "int4-g-1",
    "int4-g064",
    "int4-g",
]
UNKNOWN += [
    "INT4-g64",
    "int4-g64 ",
    " int4-g64",
    "int4-g64-sym",
    "int4-channel-asym-asym",
    "int4g64",
]
UNKNOWN += ["int4-row", "int4-g6٤", "int٤-g64", "int4-g64\n"]  # digits of another script


@pytest.mark.parametrize("name", UNKNOWN, ids=repr)
def test_unknown_scheme_names_are_refused_with_the_list(name: str) -> None:
    with pytest.raises(
        RefusedError, match=r"wanted <grid>-g<group>, .*int1, int2.*int8.*; got"
    ) as error:
        schemes.parse(name)
    assert repr(name) in str(error.value)


def test_short_names_and_what_tables_cannot_have() -> None:
    assert schemes.parse("mxfp4") == schemes.parse("fp4-g32-e8m0")
    assert schemes.parse("nvfp4") == schemes.parse("fp4-g16-e4m3")
    assert schemes.parse("mxfp4").bits_per_weight(64, 64) == 4 + 8 / 32
    assert schemes.parse("nvfp4").bits_per_weight(64, 64) == 4 + 8 / 16 + 32 / 4096
    with pytest.raises(RefusedError, match="no zero points with a table, got nf4-g64-asym"):
        schemes.parse("nf4-g64-asym")
    with pytest.raises(RefusedError, match="groups or channels for e4m3 scales"):
        schemes.parse("fp4-tensor-e4m3")


@pytest.mark.parametrize("grid", TABLES, ids=lambda g: g.name)
@pytest.mark.parametrize("sign", [1, -1])
def test_tables_round_to_the_nearest_level(grid: Grid, sign: int) -> None:
    """Every code comes back, ties go to a level an even number of levels from 0, ends saturate."""
    levels = np.float32(grid.values)
    s, scale = Scheme(grid, 0), np.full((1, 1), sign * 0.25, np.float32)
    codes, zero = np.arange(len(levels), dtype=np.uint8)[None], np.zeros((1, 1), np.uint8)
    q = QTensor(codes, scale, zero, s)
    assert np.array_equal(ops.decode(q), q.dequantize())
    assert np.array_equal(ops.encode(q.dequantize(), scale, zero, s).codes, codes)
    middles = ((levels[:-1] + levels[1:]) / 2)[None]
    even = (np.arange(len(levels)) - grid.values.index(0.0)) % 2 == 0
    upper = np.arange(1, len(levels))
    want = np.where(even[1:], upper, upper - 1)
    assert np.array_equal(ops.encode(middles * scale, scale, zero, s).codes[0], want)
    for towards, code in ((np.inf, upper), (-np.inf, upper - 1)):
        beside = np.nextafter(middles, np.float32(towards)) * scale
        assert np.array_equal(ops.encode(beside, scale, zero, s).codes[0], code)
    ends = np.float32([[1e9, -1e9, np.inf, -np.inf, 0.0, -0.0]]) * sign
    middle, last = grid.values.index(0.0), len(levels) - 1
    assert ops.encode(ends, scale, zero, s).codes.tolist() == [[last, 0, last, 0, middle, middle]]


def test_fp4_is_e2m1() -> None:
    every = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert sorted(set(every.tolist())) == list(schemes.grids()["fp4"].values)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_scales_of_hardware_formats_are_numbers_of_theirs(name: str) -> None:
    s, W = schemes.parse(name), rng(name).normal(size=(20, 96)).astype(np.float32)
    scales, zeros = ops.fit(W, s)
    q = ops.encode(W, scales, zeros, s)
    stored = scales * np.float32(q.global_scale)
    kind = ml_dtypes.float8_e8m0fnu if name == "mxfp4" else ml_dtypes.float8_e4m3fn
    assert np.allclose(stored.astype(kind).astype(np.float32), stored, rtol=1e-6)
    largest = np.abs(W).reshape(20, -1, s.group).max(2)
    if name == "mxfp4":  # OCP MX 1.0: the exponent of the largest, less that of 4
        assert np.array_equal(scales, np.exp2(np.floor(np.log2(largest)) - 2))
    else:
        assert stored.max() == 448.0
        assert np.abs(scales * 6 / largest - 1).max() <= 2.0**-4


@pytest.mark.parametrize("package", registry.PACKAGES)
def test_unknown_modules_are_refused_with_the_list(package: str) -> None:
    known = ", ".join(registry.names(package))
    for name in ("nothing", "..", "os", "__init__"):
        with pytest.raises(ValueError, match=f"{name!r}; known: {known}"):
            registry.get(package, name)


def test_a_qtensor_of_the_wrong_shape_is_refused() -> None:
    s = scheme(4, 8)
    codes, scales, zeros = random_codes(4, 20, s)
    for wrong in ((scales[:, :2], zeros), (scales, zeros[:2]), (scales.T, zeros.T)):
        with pytest.raises(InputError, match=r"\[QTensor\] scales and zeros must be .* got"):
            QTensor(codes, *wrong, s)


def test_worked_example_absmax() -> None:
    W = np.array([[1.2, -0.5, -4.3, 1.2, -3.1, 0.8, 2.4, 5.4]], np.float32)
    s = scheme(8, 0, scale="fp32")
    scales, zeros = ops.fit(W, s)
    q = ops.encode(W, scales, zeros, s)
    assert scales.tolist() == [[np.float32(5.4) / np.float32(127)]]
    assert f"{scales[0, 0]:.4f}" == "0.0425"
    assert (q.codes[0].astype(int) - 128).tolist() == [28, -12, -101, 28, -73, 19, 56, 127]
    assert np.abs(ops.decode(q) - W).max() <= scales[0, 0] / 2


def test_worked_example_affine() -> None:
    W = np.array([[0.1, 0.5, 1.2, 2.8, -0.3, -1.5]], np.float32)
    s = scheme(8, 0, symmetric=False, scale="fp32")
    scales, zeros = ops.fit(W, s)
    q = ops.encode(W, scales, zeros, s)
    assert scales[0, 0] == np.float32(4.3) / np.float32(255)
    assert zeros.tolist() == [[89]]
    assert q.codes.tolist() == [[95, 119, 160, 255, 71, 0]]
    step = 4.3 / 255
    np.testing.assert_allclose(ops.decode(q)[0], step * (q.codes[0] - 89.0), rtol=2.0**-22)
    assert np.abs(ops.decode(q) - W).max() <= step / 2 * (1 + 2.0**-20)


def test_bits_per_weight_of_the_common_schemes() -> None:
    assert schemes.parse("int4-g128").bits_per_weight(4096, 4096) == 4 + 16 / 128
    assert schemes.parse("int4-g64-asym").bits_per_weight(128, 128) == 4 + 20 / 64
    assert schemes.parse("int8-channel").bits_per_weight(10, 64) == 8 + 16 / 64
    assert schemes.parse("int8-tensor").bits_per_weight(8, 64) == 8 + 16 / 512


@pytest.mark.parametrize("shape", [(8,), (2, 0), (0, 4), (2, 2, 2)])
def test_a_qtensor_is_a_matrix(shape):
    codes = np.zeros(shape, np.uint8)
    one = np.ones((2, 1))
    with pytest.raises(InputError, match=r"wanted codes \(n, k\)"):
        QTensor(codes, one.astype(np.float32), one.astype(np.uint8), schemes.parse("int4-g64"))
