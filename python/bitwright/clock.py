"""Where a run's time goes: seconds of each phase, over the whole run and block by block.

A phase inside another is the inner one's time alone, so that phases add up: a weight read during
the forward is reading. What no phase claims is the rest of the total.

    forward     blocks on the calibration batches, v's mixed inputs among them
    statistics  Gram and cross sums
    solve       factor, sweep, refinement
    read save   weights from the checkpoint; finished linears and hidden states into the work folder
    write       the result, written, read back and compared
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter

IO = ("read", "save", "write")


class Clock:
    """seconds: by phase. blocks: the same for each block that has run since `mark` began it.
    settle: called before each reading, where work goes on behind Python's back."""

    def __init__(self, settle: Callable[[], None] = lambda: None) -> None:
        self.settle = settle
        self.seconds: dict[str, float] = {}
        self.blocks: list[dict[str, float]] = []
        self._open: list[str] = []
        self._since = 0.0
        self._marked: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs inside counts as `name`."""
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def _switch(self) -> None:
        self.settle()
        now = perf_counter()
        if self._open:
            phase = self._open[-1]
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now

    def mark(self) -> None:
        """A block begins."""
        self._switch()
        self._marked = dict(self.seconds)

    def keep(self) -> None:
        """The block is over."""
        self._switch()
        spent = {k: v - self._marked.get(k, 0.0) for k, v in self.seconds.items()}
        self.blocks.append({k: v for k, v in spent.items() if v > 0.0})


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Parts of the total: forward, statistics, solve, I/O and, where a total is given, the rest."""
    parts = {phase: seconds.get(phase, 0.0) for phase in ("forward", "statistics", "solve")}
    parts["I/O"] = sum(seconds.get(phase, 0.0) for phase in IO)
    known = sum(parts.values())
    total = seconds.get("total", known)
    if "total" in seconds:
        parts["rest"] = max(0.0, total - known)
    return {name: part / total if total > 0 else 0.0 for name, part in parts.items()}
