"""Every solver in solvers.NAMES: the properties that any solver of the layer objective has.

A solver that says NEEDS_H is walked through all of them; the others through those that do not
speak of H. No NaN, no code beyond the grid and no scale off its grid leaves a solver.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from answers import SCHEMES, SOLVERS, TWO, WITH_H, same, solve, sound
from bitwright import ops, registry, schemes
from bitwright.hessian.factored import column_order
from bitwright.matrix import quantize_matrix
from bitwright.spec import InputError, QTensor, Scheme
from problems import FUSED, UNIT, hessian, inputs, random_codes, rng, stats, threads, weights
from ref.gptq import gptq
from ref.gptq_search import gptq_search
from ref.quadratic import quadratic
from ref.refine import refine


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_is_a_module_of_this_form(name: str) -> None:
    module = registry.get("solvers", name)
    assert isinstance(module.NEEDS_H, bool)
    assert len(module.__doc__) > 200
    assert callable(module.prepare)
    assert callable(module.solve)


@pytest.mark.parametrize("size", [1e-6, 1.0, 3e5])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", WITH_H)
def test_uncorrelated_inputs_give_plain_rounding(name: str, scheme: str, size: float) -> None:
    W = weights(51, 100)
    q, report = solve(name, W, size * np.eye(100), scheme)
    sound(q, report)
    assert same(q, ops.encode(W, q.scales, q.zeros, q.scheme, steps=q.steps))


@pytest.mark.parametrize(
    "scheme", ["int2-g16-asym", "int3-channel-asym", "int4-g64", "int8-g32-asym"]
)
@pytest.mark.parametrize("k", [1, 47, 48, 49, 96, 100, 150])
@pytest.mark.parametrize("effort", ["fast", "default"])
@pytest.mark.parametrize("name", WITH_H)
def test_block_size_changes_nothing(name: str, effort: str, k: int, scheme: str) -> None:
    """Against the twins, which have no blocks: equal codes. A new solver adds its twin here."""
    twin = {"gptq": {"fast": swept, "default": searched_and_refined}}[name][effort]
    W, s, H = weights(31, k), schemes.parse(scheme), hessian(k)
    solver = registry.get("solvers", name)
    q, _ = solve(name, W, H, s, **solver.EFFORTS[effort])
    assert same(q, twin(W, H, q, solver.prepare(stats(H), s)[0]))


def swept(W: np.ndarray, _H: np.ndarray, q: QTensor, p: Any) -> QTensor:
    """gptq on the scales of q."""
    g, bits = q.scheme.columns(W.shape[1]), q.scheme.bits
    codes, _ = gptq(W, p.R, p.order, q.scales, q.zeros, g, bits, FUSED)
    return dataclasses.replace(q, codes=codes)


def searched_and_refined(W: np.ndarray, H: np.ndarray, q: QTensor, p: Any) -> QTensor:
    s = q.scheme
    g, span = s.columns(W.shape[1]), 2 if s.bits < 3 else 1
    side = (g, s.bits, s.symmetric, 0, s.scale, ops.FEEDBACK_FACTORS, span, False)
    codes, scales, zeros, _ = gptq_search(W, p.R, p.order, *side, FUSED)
    more = (g, s.bits, s.scale, "ccclclc", 1e-4)
    codes, scales, *_ = refine(W, H, p.dead, p.added, *more, codes, scales, zeros, FUSED)
    return QTensor(codes, scales, zeros, s)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scheme", ["int2-g16-asym", "int3-g10", "int4-g64", "int4-channel-asym"])
@pytest.mark.parametrize("name", WITH_H)
def test_error_is_below_plain_rounding_and_as_reported(name: str, scheme: str, seed: int) -> None:
    W, H = weights(40, 120, seed), hessian(120, seed)
    q, report = solve(name, W, H, scheme)
    assert report.error < 0.8 * report.error_rtn
    assert report.method == name
    s = schemes.parse(scheme)
    size, d = quadratic(W, H), np.sqrt(H.diagonal() + report.damping * H.diagonal().mean())
    for found, reported in ((q, report.error), (plain(W, s), report.error_rtn)):
        E = W - found.dequantize()
        # two float32 chains along k, as in tests/test_recursion.py, with |H_ij| <= d_i d_j
        rough = np.sum((np.abs(E) @ d) ** 2) + reported * np.sum((np.abs(W) @ d) ** 2)
        slack = (2 * (120 + 5) + 50) * UNIT * rough / size
        assert abs(reported - quadratic(E, H) / size) <= slack


def plain(W: np.ndarray, s: Scheme) -> QTensor:
    return ops.encode(W, *ops.fit(W, s), s)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", SOLVERS)
def test_permuted_rows_give_the_permuted_result(name: str, scheme: str) -> None:
    W, H = weights(101, 70), hessian(70)
    order = rng("rows").permutation(101)
    a, _ = solve(name, W, H, scheme)
    b, _ = solve(name, W[order], H, scheme)
    steps = None if a.steps is None else a.steps[order]
    rows = (a.codes[order], a.scales[order], a.zeros[order])
    assert same(QTensor(*rows, a.scheme, steps=steps), b)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", SOLVERS)
def test_thread_count_changes_nothing(name: str, scheme: str, n: int) -> None:
    W, H = weights(203, 70), hessian(70)
    with threads(1):
        a, one = solve(name, W, H, scheme)
    with threads(n):
        b, many = solve(name, W, H, scheme)
    assert same(a, b)
    assert one == many


def spanning(s: Scheme, n: int, k: int) -> QTensor:
    """Random codes whose groups reach both ends of the range that plain rounding would choose."""
    codes, scales, zeros = random_codes(n, k, s)
    integers = s.grid.uniform and s.symmetric and s.bits > 1
    lowest = 1 if integers else 0  # absmax spends no code below -max
    codes = np.maximum(codes, lowest)
    for first in range(0, k, s.columns(k)):
        codes[:, first], codes[:, min(first + 1, k - 1)] = lowest, len(s.grid.values) - 1
    if s.group == -1:
        scales[:], zeros[:] = scales[0], zeros[0]
    return QTensor(codes, scales, zeros, s, 4096.0 if s.scale == "e4m3" else 1.0)


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name not in ("int4-g1", TWO)])
@pytest.mark.parametrize("name", SOLVERS)
def test_exact_codewords_come_back(name: str, scheme: str) -> None:
    """Not with two levels, whose steps leave room above the largest scale."""
    k = 96 if "g10" not in scheme else 90  # every group has room for both ends
    q = spanning(schemes.parse(scheme), 37, k)
    again, report = solve(name, q.dequantize(), hessian(k), q.scheme)
    assert same(again, q)
    assert report.error == 0


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", WITH_H)
def test_dead_columns_are_rounded_not_zeroed(name: str, scheme: str) -> None:
    W, H = weights(20, 80), hessian(80)
    dead = np.zeros(80, bool)
    dead[[0, 17, 18, 79]] = True
    H[dead] = H[:, dead] = 0
    q, report = solve(name, W, H, scheme)
    sound(q, report)
    assert report.dead == 4
    assert np.array_equal(
        q.codes[:, dead], ops.encode(W, q.scales, q.zeros, q.scheme, steps=q.steps).codes[:, dead]
    )
    if q.scheme.bits > 1:
        assert np.any(q.dequantize()[:, dead] != 0)
    everywhere, report = solve(name, W, np.zeros((80, 80)), scheme)
    sound(everywhere, report)
    assert report.dead == 80
    assert same(
        everywhere,
        ops.encode(W, everywhere.scales, everywhere.zeros, q.scheme, steps=everywhere.steps),
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", [(0, 0), (3, 7), (59, 59)])
@pytest.mark.parametrize("name", SOLVERS)
def test_nan_in_h_or_w_is_refused(name: str, where: tuple[int, int], bad: float) -> None:
    W, H = weights(60, 60), hessian(60)
    broken = H.copy()
    broken[where] = broken[where[::-1]] = bad
    with pytest.raises(InputError, match="H must be finite"):
        solve(name, W, broken, "int4-g16")
    with pytest.raises(InputError, match="wanted a finite H"):
        quantize_matrix(W, broken, method=name)
    W[where] = bad
    with pytest.raises(InputError, match="W must be finite"):
        solve(name, W, H, "int4-g16")
    with pytest.raises(InputError, match="wanted finite weights"):
        quantize_matrix(W, H, method=name)


@pytest.mark.parametrize("name", WITH_H)
def test_a_solver_that_needs_h_says_so(name: str) -> None:
    with pytest.raises(InputError, match="wanted Stats with H, got none"):
        registry.get("solvers", name).solve(weights(3, 8), None, schemes.parse("int4-g8"))


@pytest.mark.parametrize(
    ("name", "option"), [("gptq", "order"), ("gptq", "scales"), ("rtn", "scales")]
)
def test_unknown_options_are_refused_with_the_list(name: str, option: str) -> None:
    with pytest.raises(InputError, match=rf"{option} must be (\w+, )+\w+ or \w+, got 'none'"):
        solve(name, weights(3, 8), hessian(8), "int4-g8", **{option: "none"})


@pytest.mark.parametrize("scales", ["mse", "clip"])
def test_rtn_with_searched_scales_is_sound_and_better(scales: str) -> None:
    W, H = weights(40, 120), hessian(120)
    for scheme in SCHEMES:
        if scales == "clip" and not schemes.parse(scheme).plain:
            continue
        q, report = solve("rtn", W, H, scheme, scales=scales)
        sound(q, report)
        assert same(q, ops.encode(W, q.scales, q.zeros, q.scheme, steps=q.steps))
        if scheme in ("int2-g16-asym", "int3-g10", "int4-g64"):
            assert report.error < report.error_rtn


@pytest.mark.parametrize(
    "options", [{"order": "act"}, {"order": "natural"}, {"scales": "mse"}, {"scales": "minmax"}]
)
def test_gptq_options_are_sound_and_better_than_rounding(options: dict[str, str]) -> None:
    W, H = weights(40, 120), hessian(120)
    for scheme in SCHEMES:
        q, report = solve("gptq", W, H, scheme, **options)
        sound(q, report)
        if scheme in ("int3-channel-asym", "int4-g64", "int8-g32-asym"):
            assert report.error < report.error_rtn


def test_gptq_column_orders() -> None:
    """gar: descending inside each group of 3, groups by their largest; ties keep their place."""
    order = column_order
    diagonal = np.array([1, 5, 3, 9, 2, 2, 9, 4], np.float64)
    assert order(diagonal, 3, "gar").tolist() == [3, 4, 5, 6, 7, 1, 2, 0]
    assert order(diagonal, 3, "act").tolist() == [3, 6, 1, 7, 2, 4, 5, 0]
    assert order(diagonal, 3, "natural").tolist() == list(range(8))


@pytest.mark.parametrize("options", [{"scales": "hessian"}, {"scales": "feedback"}])
@pytest.mark.parametrize("scheme", ["int3-g16-asym", "nf4-g16", "int4-g16-offset-fp16-2x6"])
def test_few_rows_are_solved_as_among_many(scheme: str, options: dict[str, str]) -> None:
    """On panels of another width where that is faster."""
    W, H = weights(120, 80), hessian(80)
    whole, _ = solve("gptq", W, H, scheme, **options)
    for count in (1, 2, 5):
        with threads(count):
            for n in (1, 12, 24, 25, 48, 49, 73, 120):
                q, _ = solve("gptq", W[:n], H, scheme, **options)
                assert same(q, ops.rows_of(whole, slice(n)))


def test_narrow_panels_leave_a_quarter_of_the_lanes_out() -> None:
    """Where there are some (Zen 4), a lane of them takes up to 1.4 times as long to refine."""
    usual = ops.panel_rows(10**6)
    for count in (1, 2, 5):
        with threads(count):
            for n in range(1, 1100):
                panel = ops.panel_rows(n)
                lanes, most = (-(-n // width // count) * width for width in (panel, usual))
                assert panel == usual or (panel < usual and 4 * lanes <= 3 * most), (n, count)


@pytest.mark.parametrize("scheme", ["int3-g16-asym", "int4-tensor", "nvfp4"])
@pytest.mark.parametrize("name", SOLVERS)
def test_errors_are_worked_out_where_they_are_wanted(
    name: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same result without them; of an H that cannot be factored too."""
    W, dead = weights(20, 48), hessian(48)
    dead[5] = dead[:, 5] = 0.0
    fields = ("error", "error_rtn", "error_swept")
    for H in (hessian(48), dead, -np.eye(48)):
        q, report = solve(name, W, H, scheme)
        with monkeypatch.context() as patch:
            patch.setattr(ops, "quadratic", None)  # who calls it fails
            patch.setattr(ops, "relative_error", None)
            alone, bare = solve(name, W, H, scheme, errors=False)
        assert same(q, alone)
        assert all(np.isnan(getattr(bare, x)) for x in fields if getattr(report, x) is not None)
        kept = {x: getattr(report, x) for x in fields}
        assert dataclasses.replace(bare, **kept) == report
        assert np.isfinite([x for x in kept.values() if x is not None]).all()


@pytest.mark.parametrize(
    "kind", [np.float32, np.float64, np.float16, torch.float32, torch.bfloat16]
)
def test_quantize_matrix_takes_numpy_and_torch(kind: Any) -> None:
    W, X = weights(24, 40), inputs(200, 40)
    H = X.T @ X / len(X)
    if isinstance(kind, torch.dtype):
        given: Any = torch.from_numpy(W).to(kind).T.contiguous().T
        W, H = given.float().numpy(), torch.from_numpy(H)
    else:
        given = np.asfortranarray(W.astype(kind))
        W = given.astype(np.float32)
    q, report = quantize_matrix(given, H, "int4-g16", report=True, tokens=200)
    want, _ = solve("gptq", np.ascontiguousarray(W), np.asarray(H, np.float64), "int4-g16")
    assert same(q, want)
    assert (report.method, report.tokens) == ("gptq", 200)
    assert same(quantize_matrix(given, H, "int4-g16"), want)
    assert same(quantize_matrix(given), plain(np.ascontiguousarray(W), schemes.parse("int4-g64")))


def test_quantize_matrix_refuses_what_it_cannot_use() -> None:
    W, H = weights(8, 12), hessian(12)
    for wrong in (W[0], W[None], W[:, :0], W[:0]):
        with pytest.raises(InputError, match=r"wanted W of shape \(out, in\).* got"):
            quantize_matrix(wrong)
    for lopsided in (H[:11], H[:11, :11], H[None]):
        with pytest.raises(InputError, match=r"H must be 12 x 12 to match W, got"):
            quantize_matrix(W, lopsided)
    with pytest.raises(InputError, match="wanted a symmetric H, got"):
        quantize_matrix(W, np.triu(H))
    with pytest.raises(ValueError, match="no solver named 'magic'; known: rtn, gptq"):
        quantize_matrix(W, H, method="magic")
