"""Blocks on the calibration batches, halted wherever a group of linears is to be solved.

The input of o depends on the already quantized q, k, v, and so on down the block:

    q,k | v | o | gate,up | down          solve, swap the weights in, go on

Each batch runs its block forward once, inside a greenlet. A pre-hook on the linears of a group
parks the batch and hands their input to the statistics; when every batch has arrived the group is
solved, its weights are swapped in, and all batches go on: one forward per batch. With `rerun`
nothing is parked: the block runs again for each group and is cut off there (memory for time). Both
give the same bits.

Streams. A batch is a tuple of hidden states: what the quantized model makes of its tokens, and,
where a solver asks for the drift of its inputs, what the float model makes of them. Both streams
park at the same places, each with its own weights, and the statistics get both inputs.

v is solved after q and k but read before attention runs, so it parks inside the attention function
(`calib.attention`): its hook keeps the input x, and after the solve `value` is computed again from
x through the same view. That needs `value` to be a view of linear(x); where it is not, v parks at
its own hook and a note says so. Its statistics are those of the attention-mixed inputs of each KV
head (`attention.mix`) where the solver asks for them (`mix`), of a fused projection in two steps,
the rows of q and k first; else, where v reads what q and k read, theirs serve again. KV heads are
pooled where their matrices would take more memory than those of the block's widest input.

On a GPU (`calib.device`) lie the weights and what is parked; hidden states between blocks come from
host memory and go back there.

One inference_mode around the hub and none inside: it belongs to the thread, and all greenlets
share one. Whatever ends a run early (an error, Ctrl-C) is thrown into every parked greenlet and
unwinds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from greenlet import GreenletExit, getcurrent, greenlet  # type: ignore[import-untyped]
from torch import nn

from bitwright.calib import attention
from bitwright.calib.memory import Heap
from bitwright.calib.parked import Arrival, Cut, NotAView, Stream, Waiting
from bitwright.calib.skeleton import Skeleton, value_rows
from bitwright.calib.walk import first
from bitwright.calib.weights import BlockWeights, Weights
from bitwright.spec import Arch, Group, InputError, RefusedError, Stats

Streams = tuple[torch.Tensor, ...]
Solve = Callable[[Group, Stats], Weights]
Done = Callable[[Group], Weights | None]


class Collector(Protocol):
    """What `calib.stats.StatsCollector` does."""

    def update(self, x: Any, drift_from: Any = None, stream: Any = None) -> Any: ...
    def finish(self) -> Stats: ...


class Capture:
    """Runs the blocks of a skeleton for an architecture.

    collector: makes the statistics of k columns, for a number of heads (0: one matrix). mix: v's
    statistics are those of its attention-mixed inputs, of every `mix`th query; 0: they are not.
    sums: where there are two streams, the statistics of linears whose outputs are added to the
    residual stream get that as well (`Group.stream`). told: what a report should say about how the
    statistics were taken, and the block where it was found; with what an earlier run was told,
    `recall` goes on as that one would have.
    """

    PLAIN, OUTSIDE = "v has the plain Gram", "v is solved before attention"

    def __init__(
        self,
        skeleton: Skeleton,
        arch: Arch,
        collector: Callable[[int, int], Collector],
        mix: int = 0,
        sums: bool = False,
        heap: Heap | None = None,
    ) -> None:
        self.skeleton, self.arch, self.collector, self.mix = skeleton, arch, collector, mix
        self.sums, self.heap = sums, heap or Heap()
        self.inside = True
        self.told: dict[str, int] = {}
        known = any("attn.v" in x.roles for group in arch.groups for x in group.linears)
        if mix and not known:
            self.mix = 0
            self.tell(f"{self.PLAIN}: the roles of its linears are not known", 0)

    @property
    def notes(self) -> list[str]:
        return list(self.told)

    def tell(self, note: str, block: int) -> None:
        self.told.setdefault(note, block)

    def recall(self, told: Mapping[str, int]) -> None:
        """What was told by a run that is taken up."""
        self.told = {**told, **self.told}

    def _take_up(self, i: int) -> None:
        """What was found in the blocks before i, by this run or the one that it takes up."""
        earlier = [note for note, block in self.told.items() if block < i]
        if any(note.startswith(self.PLAIN) for note in earlier):
            self.mix = 0
        if any(note.startswith(self.OUTSIDE) for note in earlier):
            self.inside = False

    def stages(self, i: int) -> tuple[Group, ...]:
        """The groups of block i in the order in which they are solved: a fused q, k, v is two."""
        found: list[Group] = []
        for group in self.arch.groups:
            roles = group.linears[0].roles
            if not self.mix or len(group.linears) > 1 or not {"attn.q", "attn.v"} <= set(roles):
                found.append(group)
                continue
            linear = group.linears[0]
            shape = self.skeleton.slots[f"{self.skeleton.path(i)}.{linear.name}.weight"].meta.shape
            rows = shape[1] if linear.transposed else shape[0]
            cut = rows - value_rows(self.skeleton, rows)
            found.append(replace(group, rows=(0, cut)))
            found.append(replace(group, rows=(cut, rows), inside_attention=True))
        return tuple(found)

    def run_block(
        self,
        i: int,
        hidden: list[Streams],
        solve: Solve,
        done: Done | None = None,
        rerun: bool = False,
    ) -> list[Streams]:
        """Block i on all batches, of streams (B, L, h), solved group by group; returns its outputs.

        The list `hidden` is emptied, so that each input is freed as soon as its batch is through.
        solve: group, statistics over all batches -> dense weights (n, k) by linear name, those that
        replace the float ones. done: the same for a group that is finished already, or None.
        InputError: NaN or infinity at the input of a linear.
        """
        batches = [
            tuple(Stream(h, quantized=n == 0) for n, h in enumerate(streams)) for streams in hidden
        ]
        hidden.clear()
        self._take_up(i)
        with torch.inference_mode(), self.skeleton.block(i):
            run = _Run(self, i, batches, rerun)
            for g, group in enumerate(run.groups):
                weights = done(group) if done is not None else None
                if weights is not None:
                    run.weights.solved(group, weights)
                    run.finished.add(g)
            with run.hooked():
                for g, group in enumerate(run.groups):
                    if g not in run.finished:
                        run.weights.solved(group, solve(group, run.reach(g)))
                return run.finish()


class _Run:
    """One block, all batches. `stage` is the group that batches are to reach: hooks of groups
    before it, and of finished ones, let them pass."""

    def __init__(
        self, capture: Capture, i: int, batches: list[tuple[Stream, ...]], rerun: bool
    ) -> None:
        self.capture, self.i, self.batches = capture, i, batches
        self.block = capture.skeleton.blocks[i]
        self.path = capture.skeleton.path(i)
        self.groups = capture.stages(i)
        self.pools = self._most_pools()
        self.weights = BlockWeights(capture.skeleton, self.path, any(len(b) > 1 for b in batches))
        self.finished: set[int] = set()
        self.rerun = rerun
        self.hub = getcurrent()
        self.stage = 0
        self.now = batches[0][0] if batches else None
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
            for norm in {group.stream for group in self.groups if self.capture.sums}:
                if norm is not None:
                    module = self.block.get_submodule(norm)
                    stack.callback(module.register_forward_pre_hook(self._note_sum).remove)
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
            arrivals = [self._advance(stream) for stream in reversed(batch)]
            arrived = arrivals.pop()
            if n == 0:
                shared = self._shared(g, arrived, before)
                collector = self.capture.collector(arrived.x.shape[-1], arrived.heads)
                head = arrived.x
            if collector is not None and shared is None:
                float_x = arrivals[0].x if arrivals else None
                collector.update(arrived.x, float_x, self._sums(g, batch))
            if self.rerun or self.groups[g].stream is not None:
                for stream in batch:
                    stream.sum = None
            del arrived, arrivals
        if collector is None:
            raise InputError("[capture] wanted at least one calibration batch, got none")
        stats = self._stats(g, collector) if shared is None else shared
        follows = g + 1 < len(self.groups) and self.groups[g + 1].inside_attention
        self.before = (g, head, stats) if follows else None
        self.capture.heap.trim()
        return stats

    def finish(self) -> list[Streams]:
        """Bring every batch through the block; its outputs."""
        self.stage = len(self.groups)
        outputs = []
        while self.batches:
            arrivals = [self._advance(stream).x for stream in reversed(self.batches[0])]
            outputs.append(tuple(x.cpu() for x in reversed(arrivals)))
            del self.batches[0]
        self.capture.heap.trim()
        return outputs

    def _advance(self, stream: Stream) -> Arrival:
        """A stream's input at the group of this stage; after the last one, the block's output."""
        self.now = stream
        self.weights.use(stream.quantized)
        while True:
            try:
                at = self._rerun(stream) if self.rerun else self._resume(stream)
                break
            except NotAView:
                self._stay_outside()
                stream.waiting = stream.run = stream.arrived = None
        arrived, stream.arrived = stream.arrived, None
        if at != self.stage or arrived is None:
            raise RefusedError(
                f"[capture] wanted {self.path} to run {self._label(self.stage)} next, "
                f"got {self._label(at)}"
            )
        self.capture.heap.trim()
        return arrived

    def _resume(self, stream: Stream) -> int:
        if stream.run is None:
            stream.run = greenlet(self._forward)
            return int(stream.run.switch(stream))
        return int(stream.run.switch())

    def _rerun(self, stream: Stream) -> int:
        stream.waiting = None
        try:
            return self._forward(stream)
        except Cut as cut:
            return int(cut.args[0])

    def _forward(self, stream: Stream) -> int:
        skeleton = self.capture.skeleton
        call = skeleton.call(self.i, stream.hidden)
        hidden = stream.hidden.to(skeleton.device)
        out = first(self.block(hidden, *call.args, **call.kwargs))
        if stream.waiting is not None:
            raise NotAView
        stream.arrived = Arrival(out)
        return len(self.groups)

    def _shared(
        self, g: int, arrived: Arrival, before: tuple[int, torch.Tensor, Stats] | None
    ) -> Stats | None:
        """The statistics of the group just solved, if this one reads the same input."""
        if before is None or before[0] != g - 1 or not self.groups[g].inside_attention:
            return None
        x = arrived.x
        same = not arrived.heads and before[1].shape == x.shape and torch.equal(before[1], x)
        return before[2] if same else None

    def _sums(self, g: int, batch: tuple[Stream, ...]) -> Streams | None:
        if self.groups[g].stream is None or len(batch) < 2:
            return None
        found = tuple(stream.sum for stream in batch if stream.sum is not None)
        return found if len(found) == len(batch) else None

    def _stats(self, g: int, collector: Collector) -> Stats:
        try:
            return collector.finish()
        except InputError as error:
            where = f"{self.path}.{self.groups[g].linears[0].name}"
            raise InputError(f"{error}, at the input of {where}") from error

    def _stay_outside(self) -> None:
        if self.capture.inside:
            self.capture.inside = False
            self.capture.tell(
                f"{self.capture.OUTSIDE}, with the plain Gram: {self.path} does not hand it a view "
                "of v's output",
                self.i,
            )

    def _abandon(self) -> None:
        for stream in (stream for batch in self.batches for stream in batch):
            if stream.run is not None and not stream.run.dead:
                stream.run.throw(GreenletExit)

    def _label(self, g: int) -> str:
        return self.groups[g].label if g < len(self.groups) else "its end"

    def _most_pools(self) -> int:
        """Matrices that v may have: as much memory as the one of the block's widest input."""
        slots = self.capture.skeleton.slots
        widths = {}
        for group in self.groups:
            shape = slots[f"{self.path}.{group.linears[0].name}.weight"].meta.shape
            widths[group] = int(shape[0] if group.linears[0].transposed else shape[1])
        values = [k for group, k in widths.items() if group.inside_attention]
        return max(1, max(widths.values()) ** 2 // max(values, default=1) ** 2)

    # the batch's side

    def _enter(self, g: int, inside: bool, module: nn.Module, args: tuple[Any, ...]) -> None:
        if g < self.stage or self.now is None:
            return
        if inside and self.capture.inside:
            self.now.waiting = Waiting(g, module, args[0])
        else:
            self.now.arrived = Arrival(args[0])
            self._park(g)

    def _note_sum(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.now is not None:
            self.now.sum = args[0]

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
            raise NotAView
        self.now.waiting = None
        self.now.arrived = self._mixed(call, waiting.x)
        self._park(waiting.group)
        again: torch.Tensor = waiting.linear.forward(waiting.x)
        if again.stride() != y.stride() or again.storage_offset() != y.storage_offset():
            raise NotAView
        return again.as_strided(value.size(), value.stride(), value.storage_offset())

    def _mixed(self, call: attention.Call, x: torch.Tensor) -> Arrival:
        if not self.capture.mix:
            return Arrival(x)
        mixed = attention.mix(call, x, self.capture.mix, self.pools)
        if mixed is not None:
            self._tell_pools(call.key.shape[1], len(mixed))
            return Arrival(mixed, len(mixed))
        self.capture.mix = 0
        self.capture.tell(f"{self.capture.PLAIN}: {self.path} attends in an unknown way", self.i)
        return Arrival(x)

    def _tell_pools(self, heads: int, pools: int) -> None:
        note = (
            f"v's {heads} KV heads share {pools} Gram matrices, as much as fits beside the widest"
        )
        if pools < heads:
            self.capture.tell(note, self.i)

    def _park(self, g: int) -> None:
        if self.now is not None and self.now.waiting is not None and self.now.waiting.group < g:
            raise NotAView
        if self.rerun:
            raise Cut(g)
        self.hub.switch(g)
