"""StatsCollector: the same sums for every chunking, dtype and kind of array."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from bitwright import StatsCollector
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


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_16_bit_inputs_are_widened(dtype):
    halves = X.astype(dtype)
    got = StatsCollector(40).update(halves).finish()
    want = StatsCollector(40).update(halves.astype(np.float32)).finish()
    assert np.array_equal(got.H, want.H)
    assert np.array_equal(got.mean_abs, want.mean_abs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torch_tensors_of_any_rank(dtype):
    tensor = torch.from_numpy(X).to(dtype)
    got = StatsCollector(40).update(tensor.reshape(13, 100, 40)).finish()
    want = StatsCollector(40).update(tensor.float().numpy()).finish()
    assert np.array_equal(got.H, want.H)
    assert StatsCollector(40).update(tensor[0]).finish().tokens == 1


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
