"""StatsCollector: the same sums for every chunking, dtype and kind of array."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from bitwright import StatsCollector, ops
from bitwright.spec import InputError

X = np.random.default_rng(0).normal(size=(1300, 40)).astype(np.float32)
EPS = np.finfo(np.float32).eps


@pytest.mark.parametrize("chunk", [1, 7, 512, 1000, 1300])
def test_any_chunking(chunk):
    collector = StatsCollector(40)
    for first in range(0, len(X), chunk):
        collector.update(X[first : first + chunk])
    stats = collector.finish()
    W = X.astype(np.float64)
    size = np.abs(W).T @ np.abs(W) / len(X)
    assert stats.tokens == len(X)
    assert (np.abs(stats.H - W.T @ W / len(X)) <= 512 * EPS * size).all()
    assert np.array_equal(stats.H, stats.H.T)
    assert np.allclose(stats.mean_abs, np.abs(W).mean(0), rtol=EPS)
    assert np.array_equal(stats.abs_max, np.abs(X).max(0))
    assert np.array_equal(stats.minimum, X.min(0))
    assert np.array_equal(stats.maximum, X.max(0))


def same(got: np.ndarray, want: np.ndarray, bf16: bool) -> bool:
    """Equal; of bf16 inputs up to the order of sums, where the machine has a product of its own."""
    if bf16 and ops.multiplies_bf16():
        size = np.sqrt(np.outer(want.diagonal(), want.diagonal()))
        return bool((np.abs(got - want) <= 512 * EPS * size).all())
    return np.array_equal(got, want)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_16_bit_inputs_are_widened(dtype):
    halves = X.astype(dtype)
    got = StatsCollector(40).update(halves).finish()
    want = StatsCollector(40).update(halves.astype(np.float32)).finish()
    assert same(got.H, want.H, dtype == ml_dtypes.bfloat16)
    assert np.array_equal(got.mean_abs, want.mean_abs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torch_tensors_of_any_rank(dtype):
    tensor = torch.from_numpy(X).to(dtype)
    got = StatsCollector(40).update(tensor.reshape(13, 100, 40)).finish()
    want = StatsCollector(40).update(tensor.float().numpy()).finish()
    assert same(got.H, want.H, dtype == torch.bfloat16)
    assert StatsCollector(40).update(tensor[0]).finish().tokens == 1


def test_half_of_each_update_is_held_out():
    """H and C are of all tokens; held.H and held.C of the second half of each update, apart."""
    collector, parts = StatsCollector(40, hold=True), []
    before = X + 0.1 * np.random.default_rng(1).normal(size=X.shape).astype(np.float32)
    for first, end in ((0, 301), (301, 700), (700, 1300)):
        collector.update(X[first:end], before[first:end])
        parts.append((first + (end - first + 1) // 2, end))
    stats = collector.finish()
    apart = np.concatenate([np.arange(*part) for part in parts])
    for got, rows in ((stats, np.arange(1300)), (stats.held, apart)):
        A, B = X[rows].astype(np.float64), (before - X)[rows].astype(np.float64)
        size = 512 * EPS * (np.abs(A).T @ np.abs(A)) / len(rows)
        assert (np.abs(got.H - A.T @ A / len(rows)) <= size).all()
        assert np.abs(got.C - B.T @ A / len(rows)).max() <= 1e-5
    assert stats.held.share == len(apart) / 1300


def test_without_the_hessian():
    assert StatsCollector(40, hessian=False).update(X).finish().H is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_name_their_column(bad):
    wrong = X.copy()
    wrong[700, 23] = bad
    with pytest.raises(InputError, match=r"NaN or infinity in column 23"):
        StatsCollector(40).update(wrong).finish()


def test_what_cannot_be_summed():
    with pytest.raises(InputError, match=r"at least one token"):
        StatsCollector(40).finish()
    with pytest.raises(InputError, match=r"40 columns, got shape \(1300, 39\)"):
        StatsCollector(40).update(X[:, :39])
    with pytest.raises(InputError, match=r"float32, float16 or bfloat16"):
        StatsCollector(40).update(X.astype(np.int32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_drift_is_what_became_of_the_inputs(dtype):
    before = (X + 0.1 * np.random.default_rng(1).normal(size=X.shape)).astype(dtype)
    after = X.astype(dtype)
    collector = StatsCollector(40)
    for rows in (slice(0, 700), slice(700, None)):
        collector.update(after[rows], before[rows])
    stats = collector.finish()
    a, b = before.astype(np.float64), after.astype(np.float64)
    size = np.sqrt(np.outer(((a - b) ** 2).mean(0), (b * b).mean(0)))
    unit = 2.0**-8 if dtype == ml_dtypes.bfloat16 else 0.0
    assert (np.abs(stats.C - (a - b).T @ b / len(X)) <= (2 * 512 * EPS + unit) * size).all()
    assert StatsCollector(40).update(after).finish().C is None
    assert not StatsCollector(40).update(after, after).finish().C.any()
    half = StatsCollector(40).update(after[:700], before[:700]).update(after[700:]).finish()
    alone = StatsCollector(40).update(after[:700], before[:700]).finish()
    assert np.array_equal(half.C, alone.C)
    assert np.array_equal(half.H, stats.H)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_what_the_outputs_are_added_to(dtype):
    """D over the compared tokens alone, from sums of any rank and another width."""
    rng = np.random.default_rng(2)
    before = rng.normal(size=(1300, 24)).astype(dtype)
    after = (before.astype(np.float32) + 0.2 * rng.normal(size=before.shape)).astype(dtype)
    x = X.astype(dtype)
    collector = StatsCollector(40)
    collector.update(x[:600], x[:600], (after[:600].reshape(3, 200, 24), before[:600]))
    collector.update(x[600:800])
    stats = collector.update(x[800:], x[800:], (after[800:], before[800:])).finish()
    rows = np.r_[:600, 800:1300]
    a, b = (before.astype(np.float64) - after.astype(np.float64))[rows], x.astype(np.float64)[rows]
    size = np.sqrt(np.outer((a**2).mean(0), (b * b).mean(0)))
    unit = 2.0**-8 if dtype == ml_dtypes.bfloat16 else 0.0
    assert stats.D.shape == (24, 40)
    assert (np.abs(stats.D - a.T @ b / 1100) <= (2 * 512 * EPS + unit) * size).all()
    assert StatsCollector(40).update(x, x).finish().D is None


def test_heads_have_their_own_matrices():
    split = X.reshape(2, 650, 40)
    stats = StatsCollector(40, 2).update(split, split[::-1]).finish()
    assert stats.tokens == 650
    for head in range(2):
        alone = StatsCollector(40).update(split[head], split[1 - head]).finish()
        assert np.array_equal(stats.H[head], alone.H)
        assert np.array_equal(stats.C[head], alone.C)
    both = StatsCollector(40).update(X).finish()
    assert np.allclose(stats.mean_abs, both.mean_abs, rtol=1e-6)
    assert np.array_equal(stats.abs_max, both.abs_max)


def test_shapes_that_do_not_fit():
    with pytest.raises(InputError, match=r"wanted inputs of 2 heads with 40 columns, got shape"):
        StatsCollector(40, 2).update(X)
    with pytest.raises(InputError, match=r"to drift from, got"):
        StatsCollector(40).update(X, X[:3])
