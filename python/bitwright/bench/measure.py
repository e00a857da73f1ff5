"""Runs the contests: peaks first, then every contender of an op in turn, on one thread and on all.

Times are minima over repeats; a contender's own preparation (a fresh copy of what it overwrites) is
not timed. Thread counts, torch's precision and its threads are as before when the run is over.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitwright import ops
from bitwright.bench import contests, peaks
from bitwright.bench.contests import OURS, Contest, Rivals
from bitwright.bench.peaks import Peaks
from bitwright.progress import Progress, silent
from bitwright.spec import InputError

FLOAT32 = 1e-6  # relative error of a product above which it is no longer float32
LEAST, MOST = 3, 12  # repeats
BUDGET = 4.0  # seconds for a contest on one thread count, once each has had LEAST
SMALLEST = 64  # columns


@dataclass(frozen=True)
class Time:
    """One op by one contender: rate in GFLOP/s (G weights/s of rounding), share of the peak that
    bounds it."""

    op: str
    shape: str
    threads: int
    who: str
    seconds: float
    rate: float
    unit: str
    share: float | None


@dataclass(frozen=True)
class Measured:
    """What `bitwright bench` found; load: of the machine when it began (1 minute)."""

    machine: dict[str, str]
    load: float
    peaks: tuple[Peaks, ...]
    times: tuple[Time, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def machine() -> dict[str, str]:
    """Processor, instruction set, CPUs that this process may use."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {"processor": name, "isa": ops.isa(), "cpus": str(ops.available_cpus())}


@contextmanager
def _as_before(rivals: Rivals) -> Iterator[None]:
    threads = ops.threads()
    others = rivals.torch.torch.get_num_threads() if rivals.torch else 0
    try:
        yield
    finally:
        ops.set_threads(threads)
        if rivals.torch:
            rivals.torch.set_threads(others)


def _times(contest: Contest, quick: bool) -> dict[str, float]:
    """Least seconds of each contender, in turn."""
    found: dict[str, float] = {}
    begin = time.perf_counter()
    for repeat in range(1 if quick else MOST):
        if repeat >= LEAST and time.perf_counter() - begin > BUDGET:
            break
        for who, contender in contest.contenders.items():
            work = contender()
            start = time.perf_counter()
            work()
            taken = time.perf_counter() - start
            found[who] = min(found.get(who, taken), taken)
    return found


def _rows(contest: Contest, limits: Peaks, found: dict[str, float]) -> Iterable[Time]:
    bound = limits.bound(contest.peak)
    for who, seconds in found.items():
        rate = contest.work / seconds / 1e9
        moved = contest.bytes / seconds / 1e9 if contest.peak == "read" else rate
        share = moved / bound if who == OURS else None
        yield Time(
            contest.op, contest.shape, limits.threads, who, seconds, rate, contest.unit, share
        )


def _notes(rivals: Rivals) -> tuple[str, ...]:
    found = []
    for who, rival, cure in (
        ("torch", rivals.torch, 'pip install "bitwright[hf]"'),
        ("OpenBLAS", rivals.openblas, 'pip install "bitwright[bench]"'),
        ("Eigen", rivals.eigen, "a build with -C cmake.define.BITWRIGHT_EIGEN=ON"),
    ):
        found.append(f"{who}: {rival.core} kernels" if rival else f"{who}: not here ({cure})")
    if rivals.torch:
        for precision in contests.PRECISIONS:
            error = rivals.torch.error_of(precision)
            verdict = "float32" if error <= FLOAT32 else "not float32"
            found.append(f"torch {precision}: products within {error:.1e}, {verdict}")
    return tuple(found)


def run(
    k: int = 4096,
    threads: int | None = None,
    quick: bool = False,
    progress: Progress = silent,
) -> Measured:
    """Peaks and all ops at k columns, on one thread and on `threads` (None: all). quick: one repeat
    of each, for a look at whether everything runs, not for figures."""
    if k < SMALLEST:
        raise InputError(f"[bench] wanted at least {SMALLEST} columns, got {k}")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    rivals = Rivals.find()
    limits: list[Peaks] = []
    times: list[Time] = []
    with _as_before(rivals):
        counts = sorted({1, ops.resolve_threads(threads)})
        ops.set_threads(counts[-1])
        for n in counts:
            ops.set_threads(n)
            limits.append(peaks.measure(quick))
        progress.start(len(contests.NAMES) * len(counts), "ops")
        for contest in contests.of(k, rivals):
            for limit in limits:
                ops.set_threads(limit.threads)
                rivals.set_threads(limit.threads)
                times += _rows(contest, limit, _times(contest, quick))
                progress.advance()
        notes = _notes(rivals)
    return Measured(machine(), load, tuple(limits), tuple(times), notes)
