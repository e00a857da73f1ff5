"""The mathematics of the GPTQ sweep (2210.17323 in inverse-free form): what must hold exactly.

With H_d = H + damping I = R R^T: the codes are those of the reference recursion on the Cholesky
factor of the inverse; the loss is e H_d e^T; the block size changes nothing; without clipping each
row keeps Babai's bound. u = 2^-24. The rounding error of r_p = R_pp (t_p - q_p) is at most

    u ((p + 5) sum_{j<p} |e_j R_jp| + R_pp (|w_p| + 2 |e_p|))

to first order: a multiply-add per earlier column, one rounding each for e, a / R, t, t - q, r.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bitwright import ops
from bitwright.spec import QTensor
from problems import DOUBLE, FUSED, UNIT, hessian, rng, scheme, threads, weights
from ref.gptq import gptq

N = 60
SIZES = [(1, 4), (2, 1), (47, 16), (48, 48), (49, 10), (96, 32), (100, 64), (150, 150)]
BITS = (2, 3, 4, 8)


class Sweep:
    """One matrix solved in a given order, with everything the checks need in that order."""

    def __init__(self, bits: int, k: int, g: int, symmetric: bool = False, wide: float = 1) -> None:
        self.s, self.W, self.H = scheme(bits, g, symmetric), weights(N, k, bits), hessian(k, bits)
        self.order = rng("order", k).permutation(k).astype(np.int32)
        self.R, damping, _ = ops.factor(self.H, 0.01, self.order)
        self.grid = ops.fit(self.W, self.s)
        if wide > 1:
            self.grid = self.grid[0] * np.float32(wide), np.full_like(self.grid[1], 2 ** (bits - 1))
        self.q, self.loss = ops.gptq(self.W, self.R, self.order, *self.grid, self.s)
        H = self.H[np.ix_(self.order, self.order)]
        self.Hd = H + damping * self.H.diagonal().mean() * np.eye(k)
        self.error = self.ordered(self.W.astype(np.float64) - self.q.dequantize())
        self.step = self.ordered(np.repeat(self.grid[0], self.s.columns(k), 1)[:, :k])

    def ordered(self, x: np.ndarray) -> np.ndarray:
        return x[:, self.order].astype(np.float64)

    def residual_limit(self) -> np.ndarray:
        """|rounding error of r_p| for each row and column (see the header)."""
        R, e, w = (
            np.abs(self.R.astype(np.float64)),
            np.abs(self.error),
            np.abs(self.ordered(self.W)),
        )
        earlier = e @ np.triu(R, 1)
        p = np.arange(len(R))
        return 1.01 * UNIT * ((p + 5) * earlier + R.diagonal() * (w + 2 * e))

    def loss_limit(self) -> np.ndarray:
        """... of the loss of each row; its squares are summed in float32 over 48 columns."""
        r = np.abs(self.error @ self.R.astype(np.float64))
        d = self.residual_limit()
        return np.sum(2 * r * d + d * d + 50 * UNIT * r * r, 1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("k", "g"), SIZES)
def test_loss_is_the_objective_of_the_damped_problem(k: int, g: int, bits: int) -> None:
    sweep = Sweep(bits, k, g)
    through_R = np.sum((sweep.error @ sweep.R.astype(np.float64)) ** 2, 1)
    limit = sweep.loss_limit()
    assert np.all(np.abs(sweep.loss - through_R) <= limit)
    exact = np.sum((sweep.error @ sweep.Hd) * sweep.error, 1)
    size = (np.abs(sweep.error) @ np.sqrt(sweep.Hd.diagonal())) ** 2
    assert np.all(np.abs(sweep.loss - exact) <= limit + (2 * UNIT + (k + 2) * DOUBLE) * size)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("k", "g"), SIZES)
def test_blocks_and_threads_change_no_code(k: int, g: int, bits: int) -> None:
    """C++ works in blocks of 48 columns and tasks of several panels, the twin column by column."""
    sweep = Sweep(bits, k, g, symmetric=True)
    args = (sweep.W, sweep.R, sweep.order, *sweep.grid)
    codes, _ = gptq(*args, sweep.s.columns(k), bits, FUSED)
    assert np.array_equal(sweep.q.codes, codes)
    for n in (2, 3):
        with threads(n):
            q, loss = ops.gptq(*args, sweep.s)
        assert np.array_equal(q.codes, codes)
        assert np.array_equal(loss, sweep.loss)


Recursion = Callable[[np.ndarray, np.ndarray, Callable[..., Any]], None]


def reference(W: np.ndarray, Hd: np.ndarray, rounded: Callable[..., Any]) -> None:
    """2210.17323: H_d^-1 = U^T U; err = (w_i - q_i) / U_ii, w_j -= err U_ij for j > i."""
    U = np.linalg.cholesky(np.linalg.inv(Hd)).T
    for i in range(W.shape[1]):
        err = (W[:, i] - rounded(i, W[:, i])) / U[i, i]
        W[:, i + 1 :] -= np.outer(err, U[i, i + 1 :])


def sliced_full_inverse(W: np.ndarray, Hd: np.ndarray, rounded: Callable[..., Any]) -> None:
    """The classic error: rows of the full inverse where the inverse of what remains belongs."""
    inverse = np.linalg.inv(Hd)
    for i in range(W.shape[1]):
        err = (W[:, i] - rounded(i, W[:, i])) / inverse[i, i]
        W[:, i + 1 :] -= np.outer(err, inverse[i, i + 1 :])


def rows_that_differ(sweep: Sweep, recursion: Recursion) -> float:
    """The share of rows whose codes differ before any target comes so near to a tie that float32
    may round it to the other side."""
    k, top = len(sweep.order), 2**sweep.s.bits - 1
    codes = sweep.q.codes[:, sweep.order]
    zero = np.repeat(sweep.grid[1], sweep.s.columns(k), 1)[:, :k][:, sweep.order].astype(float)
    near = sweep.residual_limit() / np.abs(sweep.R.diagonal()) / sweep.step
    open_rows, differs = np.ones(N, bool), np.zeros(N, bool)

    def rounded(i: int, target: np.ndarray) -> np.ndarray:
        level = target / sweep.step[:, i]
        code = np.clip(np.rint(level) + zero[:, i], 0, top)
        tie = np.abs(level - np.floor(level) - 0.5) <= near[:, i]
        differs[open_rows & ~tie & (code != codes[:, i])] = True
        open_rows[tie | (code != codes[:, i])] = False
        return (code - zero[:, i]) * sweep.step[:, i]

    recursion(sweep.ordered(sweep.W), sweep.Hd, rounded)
    return float(differs.mean())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("k", "g"), SIZES)
def test_r_form_equals_the_reference_recursion(k: int, g: int, bits: int, symmetric: bool) -> None:
    assert rows_that_differ(Sweep(bits, k, g, symmetric), reference) == 0


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("k", "g"), SIZES[2:])
def test_slicing_the_full_inverse_is_caught(k: int, g: int, bits: int) -> None:
    assert rows_that_differ(Sweep(bits, k, g), sliced_full_inverse) > 0.9


@pytest.mark.parametrize(("k", "g"), SIZES)
def test_babai_bound_without_clipping(k: int, g: int) -> None:
    """Per row sum_p (R_pp (t_p - q_p))^2 <= 1/4 sum_p s_p^2 R_pp^2; expected 1/12 of that sum.

    The mean over the rows of k terms of relative deviation below 1 (a uniform variable's square
    has sqrt(4/5)) is held to seven standard deviations.
    """
    sweep = Sweep(8, k, g, wide=4)
    assert sweep.q.codes.min() > 0
    assert sweep.q.codes.max() < 255
    terms = (sweep.step * sweep.R.diagonal()) ** 2
    assert np.all(sweep.loss <= terms.sum(1) / 4 + sweep.loss_limit())
    deviation = np.sqrt(np.sum(terms**2)) / terms.sum()
    assert abs(12 * sweep.loss.sum() / terms.sum() - 1) <= 7 * deviation


def test_feedback_is_needed_for_correlated_inputs_only() -> None:
    sweep = Sweep(4, 100, 64)
    plain = ops.encode(sweep.W, *sweep.grid, sweep.s)
    assert not np.array_equal(plain.codes, sweep.q.codes)
    assert ops.quadratic(sweep.W - plain.dequantize(), sweep.H) > sweep.loss.sum()
    flat, _, _ = ops.factor(np.eye(100), 0.01)
    q, _ = ops.gptq(sweep.W, flat, np.arange(100, dtype=np.int32), *sweep.grid, sweep.s)
    assert np.array_equal(QTensor(q.codes, *sweep.grid, sweep.s).codes, plain.codes)
