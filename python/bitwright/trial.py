"""The parts of a run, each timed at a model's shapes: for a fraction of a second, solves for some.

No weight is read and none is made: a block's own code runs with every linear answered at once, from
a tensor that lies ready.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from bitwright import ops
from bitwright.calib import device as devices
from bitwright.calib.skeleton import Skeleton
from bitwright.calib.walk import first
from bitwright.spec import F32, F64, Scheme, Stats

PATIENCE = 0.08  # seconds that repeats of one measurement may take
SOLVING = 0.4  # the same, of a solve: a row's cost is the difference of two
ROWS = 96  # per thread at least: two panels of the widest instruction set
FEW, MANY = 384, 1536  # rows whose difference tells a row's cost; of fewer, what stays in cache
DISK = 16 << 20
TILE = 64  # tokens of random answers, repeated
SLICES = 8  # of the inputs that H is made from, one in memory at a time


def typical(
    work: Callable[[], Any],
    device: torch.device = devices.CPU,
    patience: float = PATIENCE,
    warm: bool = False,
) -> float:
    """Seconds of a run in the middle of a few; a first one apart, unless `warm`; on a device until
    it is done."""
    if not warm:
        work()
        devices.settle(device)
    spent, end = [], perf_counter() + patience
    while True:
        begin = perf_counter()
        work()
        devices.settle(device)
        now = perf_counter()
        spent.append(now - begin)
        if now > end:
            return sorted(spent)[len(spent) // 2]


@contextmanager
def _pretended(skeleton: Skeleton, i: int, linears: set[str]) -> Iterator[None]:
    """Ones in the place of all weights but those of `linears`, of the other blocks and of the head;
    matrices without memory of their own."""
    inside, others = skeleton.under(skeleton.path(i)), skeleton.under(skeleton.block_path)
    gone = {*others, *(skeleton.under(skeleton.head) if skeleton.head else ())} - {*inside}
    try:
        for name, slot in skeleton.slots.items():
            if name in gone or name.rpartition(".")[0] in linears:
                continue
            shape = slot.meta.shape
            one = torch.ones((1,) * len(shape), dtype=slot.meta.dtype, device=skeleton.device)
            one = one.expand(shape)
            one = one.contiguous() if len(shape) < 2 else one
            is_parameter = isinstance(slot.meta, nn.Parameter)
            slot.table[slot.key] = nn.Parameter(one, requires_grad=False) if is_parameter else one
        yield
    finally:
        skeleton.empty()


@contextmanager
def _answered(
    block: nn.Module, rows: Mapping[str, int], reached: dict[str, float]
) -> Iterator[None]:
    """Linears of a block by name, with so many rows each, answer at once and note when."""
    ready: dict[tuple[int, ...], torch.Tensor] = {}

    def answer(name: str, n: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            devices.settle(x.device)
            reached.setdefault(name, perf_counter())
            shape = (*x.shape[:-1], n)
            if shape not in ready:
                tokens = x.numel() // x.shape[-1]
                tile = torch.randn(TILE, n).to(x.device, x.dtype)
                ready[shape] = tile.repeat(-(-tokens // TILE), 1)[:tokens].view(shape)
            return ready[shape]

        return forward

    modules = {name: block.get_submodule(name) for name in rows}
    try:
        for name, module in modules.items():
            module.forward = answer(name, rows[name])
        yield
    finally:
        for module in modules.values():
            module.__dict__.pop("forward", None)


@torch.inference_mode()
def rest_of_block(
    skeleton: Skeleton, i: int, shape: tuple[int, int, int], rows: Mapping[str, int]
) -> tuple[dict[str, float], float]:
    """Block i on hidden states of that shape but for its linears: seconds until each of them (by
    name, with so many rows) is reached, and in all."""
    block, hidden = skeleton.blocks[i], torch.randn(shape).to(skeleton.device, skeleton.dtype)
    reached: dict[str, float] = {}
    began = 0.0
    with _pretended(skeleton, i, {f"{skeleton.path(i)}.{name}" for name in rows}):
        call = skeleton.call(i, hidden)
        with _answered(block, rows, reached):

            def run() -> None:
                nonlocal began
                reached.clear()
                began = perf_counter()
                first(block(hidden, *call.args, **call.kwargs))

            spent = typical(run, skeleton.device)
    return {name: at - began for name, at in reached.items()}, spent


@dataclass(frozen=True)
class Solved:
    """Seconds: of the factor, of what every solve does once with H, and of a row."""

    factor: float
    once: float
    row: float


@dataclass(frozen=True)
class Problem:
    """A matrix to solve, of k columns. drift: with C; added: with D too."""

    k: int
    scheme: Scheme
    drift: bool
    added: bool

    def stats(self, H: F64, rows: int) -> Stats:
        k, column = self.k, np.ones(self.k, np.float32)
        C = 0.01 * H if self.drift else None
        D = np.zeros((rows, k)) if self.drift and self.added else None
        return Stats(2 * k, H, column, column, -column, column, C, None, D)


def solving(
    solver: Any,
    options: Mapping[str, Any],
    problem: Problem,
    before: Callable[[list[F32], Stats, Scheme], Any] | None = None,
) -> Solved:
    """A solver on random matrices: the factor, and matrices of few and of many rows. before: what
    is done with the matrix first."""
    rng, k, scheme = np.random.default_rng(problem.k), problem.k, problem.scheme
    step = ROWS * ops.threads()  # as much for each thread
    few = -(-FEW // step) * step
    many = max(-(-MANY // step) * step, 2 * few)
    W = rng.standard_normal((many, k), np.float32) * np.float32(0.02)
    H = _hessian(rng, k)
    stored = W.astype(ops.BFLOAT16)
    given = {**options, "prepared": solver.prepare(problem.stats(H, few), scheme, **options)}

    def run(n: int, warm: bool) -> float:
        stats = problem.stats(H, n)

        def work() -> None:
            if before is not None:
                before([W[:n]], stats, scheme)
            q, _ = solver.solve(stored[:n].astype(np.float32), stats, scheme, **given)
            torch.from_numpy(ops.decode(q)).to(torch.bfloat16)

        return typical(work, patience=SOLVING, warm=warm)

    factor = typical(lambda: solver.prepare(problem.stats(H, few), scheme, **options), warm=True)
    short, long = run(few, warm=False), run(many, warm=True)
    row = max(long - short, 0.0) / (many - few)
    return Solved(factor, max(short - row * few, 0.0), row)


def _hessian(rng: np.random.Generator, k: int) -> F64:
    """H of inputs whose columns differ in size and go together with their neighbours."""
    H, sizes = np.zeros((k, k)), np.exp(0.5 * rng.standard_normal(k)).astype(np.float32)
    for _ in range(SLICES):
        X = rng.standard_normal((-(-2 * k // SLICES), k), np.float32)
        X[:, 1:] += X[:, :-1]
        X *= sizes
        ops.gram(X, H)
    ops.mirror(H)
    H /= 2 * k
    return H


def disk() -> tuple[float, float]:
    """Seconds per byte written and synced, and read back."""
    content = bytes(DISK)
    with tempfile.TemporaryFile() as file:
        begin = perf_counter()
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        written = perf_counter() - begin

        def read() -> None:
            file.seek(0)
            file.read()

        return written / DISK, typical(read) / DISK


def checking() -> tuple[float, float]:
    """Seconds per byte of a tensor that is looked through for NaN and compared, and per weight that
    is packed, unpacked and decoded."""
    plain = np.ones(1 << 21, ops.BFLOAT16)
    codes = np.ones((1024, 1024), np.uint8)

    def look() -> None:
        np.isfinite(plain).all()
        np.array_equal(plain.view(np.uint8), plain.view(np.uint8).copy())

    def turn() -> None:
        ops.unpack(ops.pack(codes, 4), 4, 1024).astype(np.float32)

    return typical(look) / plain.nbytes, typical(turn) / codes.size
