"""Problems that break careless solvers have sound answers, and what could not be done is said."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from answers import SCHEMES, SOLVERS, WITH_H, same, solve, sound
from bitwright import ops, registry, schemes
from bitwright.matrix import quantize_matrix
from bitwright.spec import QTensor
from problems import hessian, stats, weights


def hard(what: str) -> tuple[np.ndarray, np.ndarray]:
    """W and H of problems that break careless solvers."""
    W, H = weights(9, 75), hessian(75)
    twice, loud = np.arange(75) // 2, np.where(np.arange(75) == 7, 1e4, 1.0)
    if what.startswith("outlier"):
        W[4, 40] = np.float32(what.split()[1])
    constant = np.linspace(-0.3, 0.3, 9, dtype=np.float32)[:, None]
    cases = {
        "outlier": (W, H),
        "one row": (W[:1], H),
        "one column": (W[:, :1].copy(), H[:1, :1].copy()),
        "one weight": (W[:1, :1].copy(), H[:1, :1].copy()),
        "no weight but zero": (0 * W, H),
        "constant weights": (np.repeat(constant, 75, 1), H),
        "duplicated columns": (weights(9, 38)[:, twice], hessian(38)[np.ix_(twice, twice)]),
        "few tokens": (W, hessian(75, t=10)),
        "one token": (W, hessian(75, t=1)),
        "tiny weights": (W * np.float32(1e-20), H),
        "loud channel": (W, H * np.outer(loud, loud)),
    }
    return cases["outlier" if what.startswith("outlier") else what]


HARD = ["one row", "one column", "one weight", "no weight but zero", "constant weights"]
HARD += ["duplicated columns", "few tokens", "one token", "tiny weights", "loud channel"]
HARD += [f"outlier {size}" for size in ("1e4", "-65504", "7e16")]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("what", HARD)
@pytest.mark.parametrize("name", SOLVERS)
def test_hard_problems_have_sound_answers(name: str, what: str, scheme: str) -> None:
    W, H = hard(what)
    q, report = solve(name, W, H, scheme)
    sound(q, report)
    if what in ("one column", "one weight"):
        assert same(q, ops.encode(W, q.scales, q.zeros, q.scheme, steps=q.steps))
    if what == "no weight but zero":
        assert np.all(q.dequantize() == 0)
        assert report.error == 0
    assert not report.fallback


def objective(W: np.ndarray, q: QTensor, H: np.ndarray) -> np.ndarray:
    """e (H + damping) e^T of each row, the damping of 4 bits."""
    E = W.astype(np.float64) - q.dequantize()
    return np.sum((E @ (H + 0.01 * H.diagonal().mean() * np.eye(len(H)))) * E, axis=1)


@pytest.mark.parametrize("scheme", ["int4-g16-asym", "int3-g16", "nf4-g16", "int4-channel"])
@pytest.mark.parametrize("what", [w for w in HARD if not w.startswith(("one ", "no ", "const"))])
def test_hard_problems_are_solved_no_worse_than_rounding(what: str, scheme: str) -> None:
    """In what the solver minimises, summed over the rows."""
    W, H = hard(what)
    q, _ = solve("gptq", W, H, scheme, damping=0.01, alpha=0.0)
    plain, _ = solve("rtn", W, H, scheme)
    assert objective(W, q, H).sum() <= objective(W, plain, H).sum() * (1 + 1e-5)


@pytest.mark.parametrize("scheme", ["int4-g16-asym", "int3-g16", "nf4-g16"])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_constant_row_is_as_exact_as_its_scale(name: str, scheme: str) -> None:
    """The scale is a bf16 number, whose neighbours are 2^-8 to 2^-7 of it away."""
    W, H = hard("constant weights")
    q, _ = solve(name, W, H, scheme)
    assert np.abs(W - q.dequantize()).max() <= 2.0**-7 * np.abs(W).max()


@pytest.mark.parametrize("name", WITH_H)
def test_an_outlier_is_the_matter_of_its_row(name: str) -> None:
    """Other rows are what they are without it."""
    (W, H), (calm, _) = hard("outlier 1e4"), hard("one token")
    calm, others = calm.copy(), np.arange(9) != 4
    assert np.array_equal(W[others], calm[others])
    loud, quiet = (solve(name, V, H, "int4-g16-asym")[0] for V in (W, calm))
    assert np.array_equal(loud.codes[others], quiet.codes[others])
    assert np.array_equal(loud.scales[others], quiet.scales[others])


@pytest.mark.parametrize("name", WITH_H)
def test_fewer_tokens_than_columns_is_noted(name: str) -> None:
    module, s = registry.get("solvers", name), schemes.parse("int4-g16")
    H, W = hessian(75, t=10), weights(9, 75)
    _, report = module.solve(W, dataclasses.replace(stats(H), tokens=10), s)
    assert any("10 tokens for 75 columns" in note for note in report.notes)
    _, report = module.solve(W, stats(H), s)
    assert not report.notes


def indefinite(k: int, below: float) -> np.ndarray:
    """H with mean diagonal 1 and smallest eigenvalue -below."""
    H = hessian(k)
    H /= np.sqrt(np.outer(H.diagonal(), H.diagonal()))
    H[:2], H[:, :2] = 0, 0
    H[:2, :2] = [[1, 1 + below], [1 + below, 1]]
    return H


@pytest.mark.parametrize(("below", "rung"), [(0.05, 1), (0.5, 2), (5.0, 3), (50.0, 4), (500.0, 5)])
@pytest.mark.parametrize("name", WITH_H)
def test_damping_climbs_a_ladder_and_is_reported(name: str, below: float, rung: int) -> None:
    W, H = weights(12, 60), indefinite(60, below)
    for damping, climbed in ((0.01, rung), (0.0, rung + 1), (2 * below, 0)):
        if climbed == ops.DAMPING_ATTEMPTS:
            continue
        q, report = solve(name, W, H, "int4-g16", damping=damping)
        used = damping if climbed == 0 else 0.01 * 10**rung
        assert (report.rung, report.damping) == (climbed, pytest.approx(used))
        assert (report.method, report.fallback) == (name, "")
        assert q.codes.max() < 16


@pytest.mark.parametrize("name", WITH_H)
def test_after_the_last_rung_the_fallback_is_named(name: str) -> None:
    W, H = weights(12, 60), hessian(60)
    H[3, 5] = H[5, 3] = 1e9 * H.max()
    q, report = solve(name, W, H, "int4-g16")
    assert report.method == "rtn"
    assert report.rung == ops.DAMPING_ATTEMPTS
    assert "plain rounding" in report.fallback
    assert "not positive definite" in report.fallback
    assert same(q, ops.encode(W, q.scales, q.zeros, q.scheme, steps=q.steps))
    with pytest.warns(RuntimeWarning, match="plain rounding on hessian scales: .*not positive"):
        warned = quantize_matrix(W, H, "int4-g16", method=name)
    assert same(warned, q)
    _, told = quantize_matrix(W, H, "int4-g16", method=name, report=True)
    assert told.fallback == report.fallback
