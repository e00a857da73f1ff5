"""Blocks on the calibration batches, halted wherever a group of linears is to be solved.

The input of o depends on the already quantized q, k, v, and so on down the block:

    q,k | v | o | gate,up | down          solve, swap the weights in, go on

Each batch runs its block forward once, inside a greenlet. A pre-hook on the linears of a group
parks the batch and hands their input to the statistics; when every batch has arrived the group is
solved, its weights are swapped in, and all batches go on: one forward per batch. With `rerun`
nothing is parked: the block runs again for each group and is cut off there (memory for time). Both
give the same bits.

v is solved after q and k but read before attention runs, so it parks inside the attention function
(`calib.attention`): its hook keeps the input x, and after the solve `value` is computed again from
x through the same view. That needs `value` to be a view of linear(x); where it is not, v parks at
its own hook and a note says so. Where v reads what q and k read, their statistics serve again.

One inference_mode around the hub and none inside: it belongs to the thread, and all greenlets
share one. Whatever ends a run early (an error, Ctrl-C) is thrown into every parked greenlet and
unwinds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from greenlet import GreenletExit, getcurrent, greenlet  # type: ignore[import-untyped]
from torch import nn

from bitwright.calib import attention
from bitwright.calib.memory import BATCHES_PER_TRIM, trim
from bitwright.calib.skeleton import Skeleton, as_tensor
from bitwright.calib.walk import first
from bitwright.spec import Arch, Group, InputError, RefusedError, Stats

Weights = Mapping[str, npt.NDArray[np.float32]]
Solve = Callable[[Group, Stats], Weights]
Done = Callable[[Group], Weights | None]


class Collector(Protocol):
    """What `calib.stats.StatsCollector` does."""

    def update(self, x: Any) -> Any: ...
    def finish(self) -> Stats: ...


class _Cut(Exception):
    """Ends a rerun where its group begins."""


class _NotAView(Exception):
    """v cannot be replaced inside attention."""


@dataclass(eq=False)
class _Waiting:
    """A v on its way into attention: its linear, input and output."""

    group: int
    linear: nn.Module
    x: torch.Tensor
    y: torch.Tensor | None = None


@dataclass(eq=False)
class _Batch:
    hidden: torch.Tensor
    waiting: _Waiting | None = None
    run: greenlet | None = None


class Capture:
    """Runs the blocks of a skeleton for an architecture.

    collector: makes the statistics of k columns (`StatsCollector`, or a partial of it).
    notes: what a report should say about how the statistics were taken.
    """

    def __init__(
        self, skeleton: Skeleton, arch: Arch, collector: Callable[[int], Collector]
    ) -> None:
        self.skeleton, self.arch, self.collector = skeleton, arch, collector
        self.inside = True
        self.notes: list[str] = []

    def run_block(
        self,
        i: int,
        hidden: list[torch.Tensor],
        solve: Solve,
        done: Done | None = None,
        rerun: bool = False,
    ) -> list[torch.Tensor]:
        """Block i on all batches (B, L, h), solved group by group; returns its outputs.

        The list `hidden` is emptied, so that each input is freed as soon as its batch is through.
        solve: group, statistics over all batches -> dense weights (n, k) by linear name, those that
        replace the float ones. done: the same for a group that is finished already, or None.
        InputError: NaN or infinity at the input of a linear.
        """
        batches = [_Batch(h) for h in hidden]
        hidden.clear()
        with torch.inference_mode(), self.skeleton.block(i):
            finished = set()
            for g, group in enumerate(self.arch.groups):
                weights = done(group) if done is not None else None
                if weights is not None:
                    self._swap(i, group, weights)
                    finished.add(g)
            run = _Run(self, i, batches, finished, rerun)
            with run.hooked():
                for g, group in enumerate(self.arch.groups):
                    if g not in finished:
                        self._swap(i, group, solve(group, run.reach(g)))
                return run.finish()

    def _swap(self, i: int, group: Group, weights: Weights) -> None:
        linears = {linear.name: linear for linear in group.linears}
        for name, weight in weights.items():
            if name not in linears:
                raise InputError(
                    f"[capture] wanted weights of {', '.join(linears)}, got weights of {name}"
                )
            tensor = as_tensor(weight)
            tensor = tensor.t() if linears[name].transposed else tensor
            self.skeleton.put(f"{self.skeleton.path(i)}.{name}.weight", tensor)


class _Run:
    """One block, all batches. `stage` is the group that batches are to reach: hooks of groups
    before it, and of finished ones, let them pass."""

    def __init__(
        self, capture: Capture, i: int, batches: list[_Batch], finished: set[int], rerun: bool
    ) -> None:
        self.capture, self.i, self.batches, self.finished = capture, i, batches, finished
        self.block = capture.skeleton.blocks[i]
        self.path = capture.skeleton.path(i)
        self.groups = capture.arch.groups
        self.rerun = rerun
        self.hub = getcurrent()
        self.stage, self.advances = 0, 0
        self.now = batches[0] if batches else None
        self.before: tuple[int, torch.Tensor, Stats] | None = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Hooks on the linears of every open group; none left, and no batch parked, afterwards."""
        with ExitStack() as stack:
            for g, group in enumerate(self.groups):
                for linear in () if g in self.finished else group.linears:
                    module = self.block.get_submodule(linear.name)
                    hook = partial(self._enter, g, group.inside_attention)
                    stack.callback(module.register_forward_pre_hook(hook).remove)
                    if group.inside_attention:
                        stack.callback(module.register_forward_hook(self._leave).remove)
            stack.enter_context(attention.watching(self._watch))
            stack.callback(self._abandon)
            yield

    # the hub's side

    def reach(self, g: int) -> Stats:
        """Bring every batch to group g; its statistics."""
        self.stage = g
        before, self.before = self.before, None
        shared: Stats | None = None
        collector: Collector | None = None
        for n, batch in enumerate(self.batches):
            if shared is not None and self.rerun:
                break
            x = self._advance(batch)
            if n == 0:
                shared = self._shared(g, x, before)
                collector = self.capture.collector(x.shape[-1])
                head = x
            if collector is not None and shared is None:
                collector.update(x)
            del x
        if collector is None:
            raise InputError("[capture] wanted at least one calibration batch, got none")
        stats = self._stats(g, collector) if shared is None else shared
        follows = g + 1 < len(self.groups) and self.groups[g + 1].inside_attention
        self.before = (g, head, stats) if follows else None
        trim()
        return stats

    def finish(self) -> list[torch.Tensor]:
        """Bring every batch through the block; its outputs."""
        self.stage = len(self.groups)
        outputs = []
        while self.batches:
            outputs.append(self._advance(self.batches[0]))
            del self.batches[0]
        trim()
        return outputs

    def _advance(self, batch: _Batch) -> torch.Tensor:
        """The batch's input at the group of this stage; after the last one, the block's output."""
        self.now = batch
        while True:
            try:
                x, at = self._rerun(batch) if self.rerun else self._resume(batch)
                break
            except _NotAView:
                self._stay_outside()
                batch.waiting = batch.run = None
        if at != self.stage:
            raise RefusedError(
                f"[capture] wanted {self.path} to run {self._label(self.stage)} next, "
                f"got {self._label(at)}"
            )
        self.advances += 1
        if self.advances % BATCHES_PER_TRIM == 0:
            trim()
        return x

    def _resume(self, batch: _Batch) -> tuple[torch.Tensor, int]:
        if batch.run is None:
            batch.run = greenlet(self._forward)
            arrived: tuple[torch.Tensor, int] = batch.run.switch(batch)
        else:
            arrived = batch.run.switch()
        return arrived

    def _rerun(self, batch: _Batch) -> tuple[torch.Tensor, int]:
        batch.waiting = None
        try:
            return self._forward(batch)
        except _Cut as cut:
            x, at = cut.args
            return x, at

    def _forward(self, batch: _Batch) -> tuple[torch.Tensor, int]:
        call = self.capture.skeleton.call(self.i, batch.hidden)
        out = first(self.block(batch.hidden, *call.args, **call.kwargs))
        if batch.waiting is not None:
            raise _NotAView
        return out, len(self.groups)

    def _shared(
        self, g: int, x: torch.Tensor, before: tuple[int, torch.Tensor, Stats] | None
    ) -> Stats | None:
        """The statistics of the group just solved, if this one reads the same input."""
        if before is None or before[0] != g - 1 or not self.groups[g].inside_attention:
            return None
        same = before[1].shape == x.shape and torch.equal(before[1], x)
        return before[2] if same else None

    def _stats(self, g: int, collector: Collector) -> Stats:
        try:
            return collector.finish()
        except InputError as error:
            where = f"{self.path}.{self.groups[g].linears[0].name}"
            raise InputError(f"{error}, at the input of {where}") from error

    def _stay_outside(self) -> None:
        if self.capture.inside:
            self.capture.inside = False
            self.capture.notes.append(
                f"v is solved before attention: {self.path} does not hand it a view of v's output"
            )

    def _abandon(self) -> None:
        for batch in self.batches:
            if batch.run is not None and not batch.run.dead:
                batch.run.throw(GreenletExit)

    def _label(self, g: int) -> str:
        return self.groups[g].label if g < len(self.groups) else "its end"

    # the batch's side

    def _enter(self, g: int, inside: bool, module: nn.Module, args: tuple[Any, ...]) -> None:
        if g < self.stage or self.now is None:
            return
        if inside and self.capture.inside:
            self.now.waiting = _Waiting(g, module, args[0])
        else:
            self._park(g, args[0])

    def _leave(self, module: nn.Module, _args: tuple[Any, ...], out: torch.Tensor) -> None:
        waiting = self.now.waiting if self.now is not None else None
        if waiting is not None and waiting.linear is module:
            waiting.y = out

    def _watch(self, call: attention.Call) -> torch.Tensor:
        waiting = self.now.waiting if self.now is not None else None
        if self.now is None or waiting is None or waiting.y is None:
            return call.value
        value, y = call.value, waiting.y
        if value.untyped_storage().data_ptr() != y.untyped_storage().data_ptr():
            raise _NotAView
        self.now.waiting = None
        self._park(waiting.group, waiting.x)
        again: torch.Tensor = waiting.linear.forward(waiting.x)
        if again.stride() != y.stride() or again.storage_offset() != y.storage_offset():
            raise _NotAView
        return again.as_strided(value.size(), value.stride(), value.storage_offset())

    def _park(self, g: int, x: torch.Tensor) -> None:
        if self.now is not None and self.now.waiting is not None and self.now.waiting.group < g:
            raise _NotAView
        if self.rerun:
            raise _Cut(x, g)
        self.hub.switch((x, g))
