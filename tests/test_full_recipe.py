"""What GPTQ's default effort adds to the sweep: searched scales, refinement, drift, row blocks."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from bitwright import ops, schemes
from bitwright.hessian import target
from bitwright.solvers import gptq
from bitwright.spec import Held, InputError, QTensor, Stats
from problems import hessian, inputs, rng, stats, weights

SCHEMES = ["int2-g16-asym", "int3-g16", "int4-g64", "int4-channel", "nf4-g16", "mxfp4", "nvfp4"]
SCHEMES += ["int3-g16-offset", "int4-g16-offset-fp16-2x6", "int3-g16-fp16-4x6"]
PLAIN: dict[str, Any] = {"refine": "", "alpha": 0.0}


def loss(W: np.ndarray, q: QTensor, H: np.ndarray, damping: float = 0.01) -> float:
    E = W.astype(np.float64) - q.dequantize()
    return float(np.sum((E @ (H + damping * H.diagonal().mean() * np.eye(len(H)))) * E))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", SCHEMES)
def test_every_rung_lowers_the_loss_it_looks_at(name: str, seed: int) -> None:
    """Static scales, scales after the feedback, refinement: each no worse, together much better."""
    W, H, s = weights(48, 128, seed), hessian(128, seed), schemes.parse(name)
    rungs = [{"scales": "minmax", **PLAIN}, PLAIN, {"alpha": 0.0}]
    found = [gptq.solve(W, stats(H), s, damping=0.01, **rung) for rung in rungs]
    losses = [loss(W, q, H) for q, _ in found]
    assert losses[2] <= losses[1] < losses[0]
    assert losses[2] < 0.95 * losses[0]
    report = found[2][1]
    assert report.error <= report.error_swept * (1 + 1e-6)
    assert found[1][1].error_swept == found[1][1].error


@pytest.mark.parametrize("name", SCHEMES)
def test_the_search_is_no_worse_than_its_first_candidate_in_any_group(name: str) -> None:
    """One group of columns: the search's loss of each row against that of the spanning scale."""
    s = schemes.parse(name)
    W, H = weights(60, s.columns(64), name), hessian(s.columns(64))
    order = np.arange(len(H), dtype=np.int32)
    R, _, _ = ops.factor(H, 0.01, order)
    one = np.ones(1, np.float32)
    _, searched = ops.gptq_search(W, R, order, s)
    _, spanning = ops.gptq_search(W, R, order, s, factors=one, zero_span=0)
    assert np.all(searched <= spanning)
    assert searched.sum() < spanning.sum()


@pytest.mark.parametrize("name", ["nvfp4", "nf4-g16", "fp4-g32"])
def test_the_range_of_a_table_may_end_before_its_last_level(name: str) -> None:
    s = schemes.parse(name)
    W, H = weights(60, s.columns(64), name), hessian(s.columns(64))
    order = np.arange(len(H), dtype=np.int32)
    R, _, _ = ops.factor(H, 0.01, order)
    q, wide = ops.gptq_search(W, R, order, s)
    _, narrow = ops.gptq_search(W, R, order, s, factors=ops.FEEDBACK_FACTORS)
    assert wide.sum() < narrow.sum()
    unused = np.abs(s.grid.values).max() > np.abs(np.array(s.grid.values)[q.codes]).max(axis=1)
    assert unused.any()
    assert ops.feedback_factors(schemes.parse("int4-g64")) is ops.FEEDBACK_FACTORS
    assert ops.feedback_factors(schemes.parse("mxfp4")) is ops.POWER_FACTORS


def test_the_candidates_are_those_that_the_docs_name() -> None:
    """docs/solver.md 6.3: 25 scales, the spanning one first, .45 to 1.05 of it in steps of .025."""
    factors = ops.FEEDBACK_FACTORS
    assert len(factors) == 25
    assert factors[0] == 1
    assert np.allclose(np.sort(factors), np.arange(18, 43) * 0.025)
    assert len(ops.feedback_factors(schemes.parse("nvfp4"))) == 25
    assert (gptq.DAMPING[2], gptq.DAMPING[3], gptq.DEFAULT_DAMPING) == (0.05, 0.02, 0.01)


@pytest.mark.parametrize("name", SCHEMES)
def test_no_step_of_the_refinement_loses(name: str) -> None:
    """Every prefix of the pattern is no worse than the one before, row by row."""
    W, H, s = weights(48, 128), hessian(128), schemes.parse(name)
    swept, _ = gptq.solve(W, stats(H), s, refine="", alpha=0.0)
    added = 0.01 * float(H.diagonal().mean())
    losses = [ops.refine(W, H, swept, added, pattern="", tolerance=0.0)[1]]
    for end in range(1, 8):
        losses.append(ops.refine(W, H, swept, added, pattern="ccclclc"[:end], tolerance=0.0)[1])
    for before, after in pairwise(losses):
        assert np.all(after <= before * (1 + 1e-6))
    assert losses[-1].sum() < losses[0].sum()


def test_a_row_rests_once_its_passes_gain_less_than_the_tolerance() -> None:
    """After a c that, like the last l, gained too little: where nothing is enough that is the c
    behind the first l; where anything is, the whole pattern is run."""
    W, H, s = weights(48, 128), hessian(128), schemes.parse("int3-g16")
    swept, _ = gptq.solve(W, stats(H), s, refine="", alpha=0.0)
    added = 0.01 * float(H.diagonal().mean())

    def refined(pattern: str, tolerance: float) -> tuple[QTensor, np.ndarray]:
        return ops.refine(W, H, swept, added, pattern=pattern, tolerance=tolerance)

    rested, loss = refined("ccclclclclc", 1.0)
    early, _ = refined("ccclc", 0.0)
    assert np.array_equal(rested.codes, early.codes)
    assert np.array_equal(rested.scales, early.scales)
    whole, least = refined("ccclclclclc", 0.0)
    assert not np.array_equal(rested.codes, whole.codes)
    between = refined("ccclclclclc", 1e-2)[1]
    assert least.sum() < between.sum() < loss.sum()


def test_scales_of_either_sign_help_symmetric_grids_only() -> None:
    W, H = weights(48, 128), hessian(128)
    for name, helps in (("int4-g64", True), ("int4-g64-asym", False), ("mxfp4", False)):
        s = schemes.parse(name)
        both, one = (gptq.solve(W, stats(H), s, negative=n)[0] for n in (True, False))
        assert bool((both.scales < 0).any()) == helps
        assert (loss(W, both, H) < loss(W, one, H)) == helps


def drifted(k: int, tokens: int, seed: object = 0) -> tuple[np.ndarray, np.ndarray, Stats]:
    """Inputs of the float model, what became of them, and their statistics."""
    X_float = inputs(tokens, k, seed).astype(np.float64)
    noise = rng("drift", k, seed).standard_normal((k, k)) * (0.2 / np.sqrt(k))
    X = X_float + X_float @ noise
    H, C = X.T @ X / tokens, (X_float - X).T @ X / tokens
    return X_float, X, dataclasses.replace(stats(H, tokens), C=C)


@pytest.mark.parametrize("name", ["int2-g16-asym", "int4-g64"])
def test_more_of_the_drift_is_less_error_of_the_outputs(name: str) -> None:
    W = weights(40, 64)
    X_float, X, known = drifted(64, 2000)
    errors = []
    for alpha in (0.0, 0.5, 1.0):
        q, report = gptq.solve(W, known, schemes.parse(name), alpha=alpha)
        assert report.alpha == (alpha or None)
        errors.append(np.sum((X_float @ W.T - X @ q.dequantize().T) ** 2))
    assert errors[2] < errors[1] < errors[0]


def test_the_drift_goes_once_the_last_target_stands() -> None:
    W, s = weights(40, 64), schemes.parse("int4-g64")
    known = dataclasses.replace(drifted(64, 1000)[2], D=np.ones((40, 64)))
    kept, report = gptq.solve(W, known, s)
    assert known.C is not None
    gone, same = gptq.solve(W, known, s, last=True)
    assert (known.C, known.D, known.held) == (None, None, None)
    assert np.array_equal(kept.codes, gone.codes)
    assert np.array_equal(kept.scales, gone.scales)
    assert report == same


@pytest.mark.parametrize("name", ["int3-g16", "int4-g64"])
def test_the_residual_makes_up_for_what_the_outputs_are_added_to(name: str) -> None:
    """A sum that changed by something the inputs tell: the more of it, the less error of sum and
    outputs."""
    W, s = weights(40, 64), schemes.parse(name)
    X_float, X, known = drifted(64, 2000)
    change = X @ (0.2 * W[::-1].T) + 0.01 * rng("sum").standard_normal((2000, 40))
    known = dataclasses.replace(known, D=change.T @ X / 2000)
    errors = []
    alone, told = gptq.solve(W, known, s, alpha=0.0, residual=1.0)
    assert (told.alpha, told.residual) == (0.0, 1.0)
    nothing = dataclasses.replace(known, C=np.zeros_like(known.C))
    same = gptq.solve(W, nothing, s, alpha=1.0, residual=1.0)[0]
    assert np.array_equal(alone.codes, same.codes)
    tiny = gptq.solve(W, known, s, alpha=1e-30, residual=1.0)[0]
    assert np.array_equal(tiny.codes, alone.codes)
    for residual in (0.0, 0.5, 1.0):
        q, report = gptq.solve(W, known, s, alpha=1.0, residual=residual)
        errors.append(np.sum((X_float @ W.T + change - X @ q.dequantize().T) ** 2))
    assert errors[2] < errors[1] < errors[0]
    assert (report.alpha, report.residual) == (1.0, 1.0)
    plainly = dataclasses.replace(known, D=None)
    same = [gptq.solve(W, k, s, residual=r) for k, r in ((known, 0.0), (plainly, 1.0))]
    assert np.array_equal(*(q.codes for q, _ in same))
    assert [report.residual for _, report in same] == [None, None]


def halves(k: int, first: object, second: object, tokens: int = 4000) -> Stats:
    """Statistics of two halves, the second held out."""
    (_, X1, one), (_, X2, two) = drifted(k, tokens, first), drifted(k, tokens, second)
    H, C = (one.H + two.H) / 2, (one.C + two.C) / 2
    assert len(X1) == len(X2)
    return dataclasses.replace(stats(H, 2 * tokens), C=C, held=Held(two.H, two.C, 0.5))


def test_alpha_auto_trusts_what_the_held_out_tokens_confirm() -> None:
    W, s = weights(40, 64), schemes.parse("int3-g16")
    assert gptq.solve(W, halves(64, 0, 0), s, alpha="auto")[1].alpha == 1.0
    assert gptq.solve(W, halves(64, 0, 1), s, alpha="auto")[1].alpha <= 0.25
    nothing = dataclasses.replace(halves(64, 0, 0), held=None)
    assert gptq.solve(W, nothing, s, alpha="auto")[1].alpha == target.ALPHA
    for wrong in (-0.1, 1.5, "some"):
        with pytest.raises(InputError, match=r'alpha must be 0 to 1 or "auto", got'):
            gptq.solve(W, nothing, s, alpha=wrong)


@pytest.mark.parametrize("name", ["int4-g16", "int3-channel-asym", "int4-tensor", "nvfp4"])
def test_blocks_of_rows_are_solved_each_under_its_own_h(name: str) -> None:
    s, W = schemes.parse(name), weights(36, 64)
    parts = [drifted(64, 1000, seed)[2] for seed in range(3)]
    H, C = np.stack([p.H for p in parts]), np.stack([p.C for p in parts])
    together, report = gptq.solve(W, dataclasses.replace(parts[0], H=H, C=C), s)
    assert report.heads == 3
    for b, part in enumerate(parts):
        rows = slice(12 * b, 12 * b + 12)
        alone, one = gptq.solve(W[rows], part, s, whole=W)
        assert np.array_equal(together.codes[rows], alone.codes)
        assert np.array_equal(together.scales[rows], alone.scales)
        assert (together.global_scale, one.heads) == (alone.global_scale, 0)
    if s.group == -1:
        assert len(np.unique(together.scales)) == 1
    with pytest.raises(InputError, match="rows for 3 equal blocks, got 35"):
        gptq.solve(W[:35], dataclasses.replace(parts[0], H=H, C=C), s)


def test_efforts_are_options_of_the_solver() -> None:
    assert list(gptq.EFFORTS) == ["fast", "default", "max"]
    W, H, s = weights(40, 128), hessian(128), schemes.parse("int3-g64")
    found = {name: gptq.solve(W, stats(H), s, **gptq.EFFORTS[name]) for name in gptq.EFFORTS}
    losses = [loss(W, q, H, 0.02) for q, _ in found.values()]
    assert losses == sorted(losses, reverse=True)
    static = ops.fit(W, s, H.diagonal().astype(np.float32), search=True)
    assert np.array_equal(found["fast"][0].scales, static[0])


@pytest.mark.parametrize("dead", [[0], [3, 17, 63]])
def test_dead_columns_do_not_choose_the_scales(dead: list[int]) -> None:
    """Tiny inputs: a column without signal, however large its weights, leaves the others alone."""
    W, H = weights(20, 64), 1e-6 * hessian(64)
    H[dead], H[:, dead] = 0, 0
    loud = W.copy()
    loud[:, dead] *= 0.5
    s = schemes.parse("int4-g64")
    a, b = (gptq.solve(w, stats(H), s, scales="feedback")[0] for w in (W, loud))
    live = np.setdiff1d(np.arange(64), dead)
    errors = [np.sum((w - q.dequantize())[:, live] ** 2) for w, q in ((W, a), (loud, b))]
    assert 0.5 < errors[0] / errors[1] < 2
