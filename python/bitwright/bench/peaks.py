"""What the machine can do at most, by loops that do nothing else (csrc/kernels/probe.cpp)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bitwright import ops
from bitwright.spec import InputError

READ, READ_QUICK = 1 << 28, 1 << 25  # bytes for each thread: more than a cache, but for quick runs
ROWS = 8  # of them a thread


@dataclass(frozen=True)
class Peaks:
    """GFLOP/s of multiply-adds in registers (bf16: products of pairs with float32 sums, None where
    the instruction set has none) and GB/s of reading, on so many threads."""

    threads: int
    float32: float
    float64: float
    bfloat16: float | None
    read: float

    def bound(self, kind: str) -> float:
        """What bounds work of this kind: bf16 products may be widened to float32 too."""
        if kind == "bfloat16":
            return max(self.bfloat16 or 0.0, self.float32)
        return float(getattr(self, kind))


def best(work: Callable[[], object], seconds: float, repeats: int = 5) -> float:
    """Least seconds of `repeats` runs, and of more as long as they fit into `seconds`."""
    found, begin, runs = float("inf"), time.perf_counter(), 0
    while runs < repeats or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        work()
        found = min(found, time.perf_counter() - start)
        runs += 1
    return found


def _flops(dtype: type, each: int, rounds: int, pairs: bool, seconds: float) -> float:
    width = ops.CHAINS * 4 // np.dtype(dtype).itemsize
    x = np.ones((ops.threads(), width), dtype)
    a, b = (1.0, 0.5) if pairs else (-1.0, 1.0)
    taken = best(lambda: ops.chain(x, rounds, a, b, pairs=pairs), seconds)
    return float(each * x.size * rounds / taken / 1e9)


def measure(quick: bool) -> Peaks:
    """The peaks on the threads that the ops use now."""
    rounds, seconds = (300_000, 0.05) if quick else (3_000_000, 0.5)
    try:
        pairs = _flops(np.float32, 4, rounds, True, seconds)
    except InputError:
        pairs = None
    count = (READ_QUICK if quick else READ) // 8 // ROWS
    words = np.ones((ROWS * ops.threads(), count), np.uint64)
    return Peaks(
        threads=ops.threads(),
        float32=_flops(np.float32, 2, rounds, False, seconds),
        float64=_flops(np.float64, 2, rounds, False, seconds),
        bfloat16=pairs,
        read=words.nbytes / best(lambda: ops.word_sum(words), seconds) / 1e9,
    )
