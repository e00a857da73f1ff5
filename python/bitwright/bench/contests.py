"""The ops that a run spends its time in, with the rivals that can do the same.

A contender is a function that prepares (untimed) and returns the work to be timed. Work is what the
op needs: 2 operations for each multiply-add of gram t k^2 / 2, cross t k^2, factor k^3 / 6, solve
factor + n k^2 / 2 (without the report's errors: quadratic, twice), refine one descent n k^2 and its
g n k^2, quadratic n k^2 / 2, drift 2 n k^2; rounding counts weights, its bound is reading 2 bytes
of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitwright import ops, schemes
from bitwright.bench.rivals import Eigen, OpenBlas, Torch
from bitwright.solvers import gptq
from bitwright.spec import F32, F64, Scheme, Stats

OURS = "bitwright"
PRECISIONS = ("highest", "medium")
GROUP = 128
ROWS_SHARE = 4  # ops that take long are measured on n = k / 4 rows
NAMES = (
    *("gram float32", "gram bfloat16", "cross float32", "factor float64", "solve fast"),
    *("solve default", "refine", "quadratic", "drift", "round + pack"),
)

Work = Callable[[], object]
Contender = Callable[[], Work]


@dataclass(frozen=True)
class Contest:
    """work: operations (or weights); peak: what of `Peaks` bounds it; bytes: read, where
    that bounds it."""

    op: str
    shape: str
    work: float
    peak: str
    contenders: Mapping[str, Contender]
    unit: str = "GFLOP/s"
    bytes: float = 0.0


@dataclass(frozen=True)
class Rivals:
    """Who is here."""

    torch: Torch | None
    openblas: OpenBlas | None
    eigen: Eigen | None

    @classmethod
    def find(cls) -> Rivals:
        return cls(Torch.find(), OpenBlas.find(), Eigen.find())

    def set_threads(self, n: int) -> None:
        for rival in (self.torch, self.openblas, self.eigen):
            if rival is not None:
                rival.set_threads(n)


@dataclass(frozen=True, eq=False)
class Problem:
    """A layer of n = k rows and its inputs; the Gram matrix is of twice as many tokens."""

    k: int
    X: F32
    W: F32
    H: F64
    R: F32

    @classmethod
    def draw(cls, k: int) -> Problem:
        rng = np.random.default_rng(0)
        X = rng.standard_normal((k, k), np.float32)
        X *= np.exp(rng.standard_normal(k)).astype(np.float32)
        H = np.zeros((k, k))
        for part in (X, np.roll(X, 1, 1)):
            ops.gram(part, H)
        ops.mirror(H)
        H /= 2 * k
        W = 0.02 * rng.standard_normal((k, k), np.float32)
        return cls(k, X, W, H, ops.factor(H)[0])

    @property
    def stats(self) -> Stats:
        size = np.sqrt(np.diagonal(self.H)).astype(np.float32)
        return Stats(2 * self.k, self.H, size, size, -size, size)

    @property
    def scheme(self) -> Scheme:
        return schemes.parse(f"int4-g{min(GROUP, self.k)}")


def again(work: Work) -> Contender:
    """A contender with nothing to prepare."""
    return lambda: work


def _torch_at(torch: Torch | None, work: Callable[[Any], object]) -> dict[str, Contender]:
    if torch is None:
        return {}

    def at(precision: str) -> Contender:
        def run() -> None:
            with torch.at(precision) as t:
                work(t)

        return again(run)

    return {f"torch {precision}": at(precision) for precision in PRECISIONS}


def _torch_bf16(torch: Torch | None, *matrices: F32) -> dict[str, Contender]:
    """left^T right in bf16 of the last two matrices."""
    if torch is None:
        return {}
    left, right = (torch.torch.from_numpy(x).bfloat16() for x in matrices)
    return {"torch bfloat16": again(lambda: left.T @ right)}


def gram(p: Problem, r: Rivals) -> Contest:
    k, H, H32 = p.k, np.zeros((p.k, p.k)), np.zeros((p.k, p.k), np.float32)
    who: dict[str, Contender] = {OURS: again(lambda: ops.gram(p.X, H))}
    who |= _torch_at(r.torch, lambda t: t.from_numpy(p.X).T @ t.from_numpy(p.X))
    if (blas := r.openblas) is not None:
        who["OpenBLAS"] = again(lambda: blas.gram(p.X, H32))
    if (eigen := r.eigen) is not None:
        who["Eigen"] = again(lambda: eigen.gram(p.X, H32))
    return Contest("gram float32", f"{k} x {k}", float(k) ** 3, "float32", who)


def gram_bf16(p: Problem, r: Rivals) -> Contest:
    k, H = p.k, np.zeros((p.k, p.k))
    words = p.X.astype(ops.BFLOAT16)
    who = {OURS: again(lambda: ops.gram(words, H)), **_torch_bf16(r.torch, p.X, p.X)}
    return Contest("gram bfloat16", f"{k} x {k}", float(k) ** 3, "bfloat16", who)


def cross(p: Problem, r: Rivals) -> Contest:
    k, C = p.k, np.zeros((p.k, p.k))
    before, out = np.roll(p.X, 1, 0), np.empty((p.k, p.k), np.float32)
    who: dict[str, Contender] = {OURS: again(lambda: ops.cross(before, p.X, C))}
    who |= _torch_at(r.torch, lambda t: t.from_numpy(before - p.X).T @ t.from_numpy(p.X))
    if (blas := r.openblas) is not None:
        who["OpenBLAS"] = again(lambda: blas.product(before - p.X, p.X, out, turned=True))
    return Contest("cross float32", f"{k} x {k}", 2 * float(k) ** 3, "float32", who)


def factor(p: Problem, r: Rivals) -> Contest:
    k, damped = p.k, p.H + 0.01 * np.diagonal(p.H).mean() * np.eye(p.k)
    who: dict[str, Contender] = {OURS: again(lambda: ops.factor(p.H))}
    if (torch := r.torch) is not None:
        who["torch highest"] = again(
            lambda: torch.torch.linalg.cholesky(torch.torch.from_numpy(damped))
        )

    def in_place(cholesky: Callable[[F64], None]) -> Contender:
        def prepare() -> Work:
            fresh = damped.copy()
            return lambda: cholesky(fresh)

        return prepare

    if r.openblas is not None:
        who["OpenBLAS"] = in_place(r.openblas.cholesky)
    if r.eigen is not None:
        who["Eigen"] = in_place(r.eigen.cholesky)
    return Contest("factor float64", f"{k}", float(k) ** 3 / 3, "float64", who)


def _solve(p: Problem, effort: str, n: int) -> Contest:
    k, W, stats, scheme = p.k, p.W[:n], p.stats, p.scheme

    def work() -> None:
        prepared = gptq.prepare(stats, scheme)
        gptq.solve(W, stats, scheme, prepared=prepared, errors=False, **gptq.EFFORTS[effort])

    flops = float(k) ** 3 / 3 + float(n) * k * k
    return Contest(f"solve {effort}", f"{n} x {k}", flops, "float32", {OURS: again(work)})


def refine(p: Problem) -> Contest:
    k, n = p.k, p.k // ROWS_SHARE
    W, start = p.W[:n], ops.encode(p.W[:n], *ops.fit(p.W[:n], p.scheme), p.scheme)
    work = again(lambda: ops.refine(W, p.H, start, 0.01, pattern="c"))
    return Contest("refine", f"{n} x {k}", 4.0 * n * k * k, "float32", {OURS: work})


def quadratic(p: Problem, r: Rivals) -> Contest:
    k, n = p.k, p.k // ROWS_SHARE
    E, H = np.ascontiguousarray(p.W[:n]), p.H.astype(np.float32)
    out = np.empty((n, k), np.float32)
    who: dict[str, Contender] = {OURS: again(lambda: ops.quadratic(E, p.H))}
    who |= _torch_at(
        r.torch, lambda t: ((t.from_numpy(E) @ t.from_numpy(H)) * t.from_numpy(E)).sum()
    )

    def product(multiply: Callable[[F32, F32, F32], None]) -> Contender:
        def work() -> float:
            multiply(E, H, out)
            return float(np.vdot(out, E))

        return again(work)

    if r.openblas is not None:
        who["OpenBLAS"] = product(r.openblas.product)
    if r.eigen is not None:
        who["Eigen"] = product(r.eigen.product)
    return Contest("quadratic", f"{n} x {k}", float(n) * k * k, "float32", who)


def drift(p: Problem, r: Rivals) -> Contest:
    k, n = p.k, p.k // ROWS_SHARE
    W, C, order = p.W[:n], p.H * 0.01, np.arange(p.k, dtype=np.int32)
    C32, out = C.astype(np.float32), np.empty((n, k), np.float32)
    who: dict[str, Contender] = {OURS: again(lambda: ops.drift(W, C, p.R, order))}

    def solved(t: Any) -> object:
        R, y = t.from_numpy(p.R), t.from_numpy(W) @ t.from_numpy(C32)
        y = t.linalg.solve_triangular(R.T, y, upper=False, left=False)
        return t.linalg.solve_triangular(R, y, upper=True, left=False)

    who |= _torch_at(r.torch, solved)
    if (blas := r.openblas) is not None:

        def work() -> None:
            blas.product(W, C32, out)
            blas.solve(p.R, out, turned=True)
            blas.solve(p.R, out, turned=False)

        who["OpenBLAS"] = again(work)
    return Contest("drift", f"{n} x {k}", 4.0 * n * k * k, "float32", who)


def round_pack(p: Problem, r: Rivals) -> Contest:
    k, scheme, group = p.k, p.scheme, p.scheme.group
    words = p.W.astype(ops.BFLOAT16)
    who: dict[str, Contender] = {OURS: again(lambda: ops.round_pack(words, scheme))}
    if (torch := r.torch) is not None and k % group == 0:
        t = torch.torch
        W = t.from_numpy(p.W).bfloat16()
        shifts = t.arange(0, 32, 4, dtype=t.int32)

        def work() -> object:
            groups = W.float().view(k, -1, group)
            scale = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16().float()
            codes = (groups / scale).round_().add_(8).clamp_(0, 15).to(t.int32)
            return (codes.view(k, -1, 8) << shifts).sum(-1, dtype=t.int32)

        who["torch highest"] = again(work)
    count = float(k) * k
    return Contest("round + pack", f"{k} x {k}", count, "read", who, "G weights/s", 2.0 * count)


def of(k: int, rivals: Rivals) -> Iterator[Contest]:
    """All contests at k columns, one after the other: NAMES."""
    p = Problem.draw(k)
    yield gram(p, rivals)
    yield gram_bf16(p, rivals)
    yield cross(p, rivals)
    yield factor(p, rivals)
    yield _solve(p, "fast", k)
    yield _solve(p, "default", k // ROWS_SHARE)
    yield refine(p)
    yield quadratic(p, rivals)
    yield drift(p, rivals)
    yield round_pack(p, rivals)
