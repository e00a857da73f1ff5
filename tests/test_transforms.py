"""Every transform: the float function is unchanged, the plan is the best of its candidates.

Folding moves column scales into the norm in front, y = W (x g + b) -> (W diag(s)) (x g' + b'), in
the dtype that the gain is stored in; nothing but the rounding of a LayerNorm's bias may remain.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bitwright import ops, registry, schemes
from bitwright.calib.stats import StatsCollector
from bitwright.spec import InputError, Scheme, Stats
from bitwright.transforms import awq
from bitwright.transforms.fold import fold, scale_stats
from problems import UNIT, inputs, rng, stats, weights
from ref.awq_scale import awq_scale

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
KINDS = ["rms", "rms1", "layer"]
K = 96


def outlier_inputs(t: int, k: int, *seed: object) -> np.ndarray:
    """Inputs where a few channels are many times as large as the others, as behind a norm."""
    X = rng("outliers", t, k, *seed).standard_normal((t, k)).astype(np.float32)
    X[:, rng("channels", k, *seed).choice(k, 4, replace=False)] *= 30
    return X


def collected(X: np.ndarray) -> Stats:
    return StatsCollector(X.shape[1]).update(X).finish()


def offset(kind: str) -> float:
    return 1.0 if kind == "rms1" else 0.0


def norm_of(dtype: Any, kind: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Gain as stored (rms1: less 1) and bias, with gains of both signs and a dead channel."""
    g = rng("gain", kind)
    gain = g.uniform(0.3, 3, K) * g.choice([1, 1, 1, -1], K) - offset(kind)
    gain[5] = -offset(kind)
    bias = g.normal(size=K).astype(dtype) if kind == "layer" else None
    return gain.astype(dtype), bias


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_fold_leaves_the_function(kind: str, dtype: Any) -> None:
    """s = g / g' is rounded once to float32 (u), the new bias to its dtype (half its eps)."""
    gain, bias = norm_of(dtype, kind)
    s = rng("scales").lognormal(0, 1, K).astype(np.float32)
    W, x = weights(20, K).astype(np.float64), inputs(50, K).astype(np.float64)
    new_gain, new_bias, exact = fold(gain, bias, s, kind)
    assert (new_gain.dtype, exact.dtype) == (gain.dtype, np.float32)
    assert (new_bias is None) == (bias is None)
    b, new_b = (np.zeros(K) if v is None else v.astype(np.float64) for v in (bias, new_bias))
    signal = x * (gain.astype(np.float64) + offset(kind))
    before = (signal + b) @ W.T
    after = (x * (new_gain.astype(np.float64) + offset(kind)) + new_b) @ (W * exact).T
    half = float(ml_dtypes.finfo(dtype).eps) / 2
    limit = 2 * UNIT * np.abs(signal) @ np.abs(W).T + (half + 2 * UNIT) * np.abs(b) @ np.abs(W).T
    assert np.all(np.abs(after - before) <= limit)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_fold_gives_the_scales_it_was_asked_for(kind: str, dtype: Any) -> None:
    """Up to the rounding of the stored gain, half an eps of |g'| (rms1: of |g' - 1|)."""
    gain, bias = norm_of(dtype, kind)
    s = rng("scales").uniform(0.7, 1.5, K).astype(np.float32)
    new_gain, _, exact = fold(gain, bias, s, kind)
    assert exact[5] == 1
    assert new_gain[5] == gain[5]
    live = np.arange(K) != 5
    want = np.abs(gain.astype(np.float64) + offset(kind))[live] / s[live]
    rounding = float(ml_dtypes.finfo(dtype).eps) / 2 * (want + offset(kind))
    assert np.all(np.abs(exact / s - 1)[live] <= rounding / (want - rounding) + 2 * UNIT)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_fold_keeps_gains_that_cannot_take_the_scale(kind: str, dtype: Any) -> None:
    """Where the new gain (or bias) would overflow or vanish, the channel is left as it was."""
    gain = np.full(4, 0.5, dtype)
    bias = np.full(4, 0.25, dtype) if kind == "layer" else None
    s = np.array([1e-38, 1e38, 1e-6, 1.0], np.float32)
    gain[0] = bias_0 = ml_dtypes.finfo(dtype).max
    if bias is not None:
        bias[0] = bias_0
    new_gain, new_bias, exact = fold(gain, bias, s, kind)
    assert np.isfinite(new_gain.astype(np.float64)).all()
    assert new_bias is None or np.isfinite(new_bias.astype(np.float64)).all()
    assert np.all(np.isfinite(exact) & (exact > 0))
    assert (new_gain[0], exact[0]) == (gain[0], 1)
    assert (new_gain[3], exact[3]) == (gain[3], 1)


def test_fold_by_ones_changes_nothing() -> None:
    for kind in KINDS:
        gain, bias = norm_of(np.float32, kind)
        new_gain, new_bias, exact = fold(gain, bias, np.ones(K, np.float32), kind)
        assert np.all(exact == 1)
        np.testing.assert_allclose(new_gain, gain, rtol=0, atol=2 * UNIT * (1 + offset(kind)))
        assert bias is None or np.array_equal(bias, new_bias)


@pytest.mark.parametrize("t", [1, 40, 1300])
def test_scale_stats_are_the_stats_of_scaled_inputs(t: int) -> None:
    """Column statistics to a few roundings; H to the float32 chains over 512 tokens of both."""
    X, s = inputs(t, K), rng("scales").lognormal(0, 1, K).astype(np.float32)
    ours, want = scale_stats(collected(X), s), collected(X / s)
    assert ours.tokens == want.tokens == t
    for name in ("mean_abs", "abs_max", "minimum", "maximum"):
        np.testing.assert_allclose(getattr(ours, name), getattr(want, name), rtol=6 * UNIT)
    wide = np.abs(X.astype(np.float64)) / s
    limit = 2 * (min(t, 512) + 3) * UNIT * (wide.T @ wide) / t
    assert np.all(np.abs(ours.H - want.H) <= limit)
    columns_only = StatsCollector(K, hessian=False).update(X).finish()
    assert scale_stats(columns_only, s).H is None


def grid_of(s: Scheme, k: int) -> tuple[Any, ...]:
    return s.bits, s.columns(k), s.symmetric, s.zero_min, s.scale


@pytest.mark.parametrize("name", registry.names("transforms"))
def test_a_transform_is_a_module_with_a_plan(name: str) -> None:
    module = registry.get("transforms", name)
    assert len(module.__doc__) > 200
    rescale = module.plan([weights(8, K)], stats(np.eye(K)), schemes.parse("int4-g32"))
    assert rescale.scales.shape == (K,)
    assert rescale.scales.dtype == np.float32
    assert np.all(np.isfinite(rescale.scales) & (rescale.scales > 0))
    column_statistics = StatsCollector(K, hessian=False).update(inputs(9, K)).finish()
    with pytest.raises(InputError, match="wanted Stats with H, got none"):
        module.plan([weights(8, K)], column_statistics, schemes.parse("int4-g32"))


def test_awq_candidates_are_the_papers() -> None:
    """s = mean|x|^a / sqrt(max s min s), a = 0, .05 .. .95; a dead channel counts as 1e-4."""
    size = np.array([0, 1e-2, 1, 50], np.float32)
    found = awq.candidates(size)
    assert found.shape == (20, 4)
    for a, row in zip(np.arange(20) / 20, found, strict=True):
        s = np.array([1e-4, 1e-2, 1, 50]) ** a
        np.testing.assert_allclose(row, s / np.sqrt(s.max() * s.min()), rtol=4 * UNIT)
    assert np.all(found[0] == 1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scheme", ["int4-g32", "int3-g32-asym", "int4-channel"])
def test_awq_picks_the_least_loss_of_the_group(scheme: str, seed: int) -> None:
    s, W = schemes.parse(scheme), [weights(16, K, seed), weights(9, K, seed)]
    found = collected(outlier_inputs(400, K, seed))
    losses = sum(awq_scale(w, found.H, awq.candidates(found.mean_abs), *grid_of(s, K)) for w in W)
    rescale = awq.plan(W, found, s)
    assert rescale.exponent == awq.EXPONENTS[np.argmin(losses)]
    assert np.array_equal(rescale.scales, awq.candidates(found.mean_abs)[np.argmin(losses)])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("solver", registry.names("solvers"))
@pytest.mark.parametrize("scheme", ["int4-g32", "int3-g32-asym"])
def test_awq_beats_rounding_where_channels_stand_out(scheme: str, solver: str, seed: int) -> None:
    """The scaled problem (W diag(s), stats of X / s) has the same outputs, hence the same size."""
    s, W, module = schemes.parse(scheme), weights(40, K, seed), registry.get("solvers", solver)
    found = collected(outlier_inputs(400, K, seed))
    rescale = awq.plan([W], found, s)
    _, before = module.solve(W, found, s)
    _, after = module.solve(W * rescale.scales, scale_stats(found, rescale.scales), s)
    assert rescale.exponent > 0
    assert after.error < 0.8 * before.error_rtn
    if solver == "rtn":
        loss = ops.awq_scale(W, found.H, rescale.scales[None], s)[0]
        assert after.error == pytest.approx(loss / ops.quadratic(W, found.H), rel=1e-4)
