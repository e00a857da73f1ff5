"""What a run will take, before it starts: memory, disk, time, and the scheme of each matrix.

Peak memory is the largest of the run's stages, on top of what Python and the libraries hold
already:

    embed     embeddings, for a moment beside the same in the file's dtype, and the hidden states
    block     the weights of one block, what is parked at the group in turn (or, where that does not
              fit, the hidden states and one batch: the block then runs again for each group), H of
              that group (8 k^2 bytes for k inputs), and the larger of one batch's working space and
              of solving: 8 k^2 more (factor and R), 16 with AWQ (H of the scaled inputs too), and
              for a matrix of n rows 14 n k (W, W - Q, Q and codes), 18 with AWQ (W scaled). Where
              drift is measured: the float model's share of hidden states and parked inputs, its
              weights of the block, C beside H, 16 n k for what outputs are added to, and 4 n k
              for the target
    write     the largest tensor twice, as read and as written; a matrix, its codes, its packed form

and a constant for stacks, libraries' scratch space and the heap. `calib.memory` counts activations.

Time is the forward, the Gram sums and the solve by operation counts (docs/solver.md 2), at rates
measured for a fraction of a second each.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitwright import cgroup, ops
from bitwright.calib.memory import parked_bytes, trim, working_bytes
from bitwright.job import Job, open_job
from bitwright.recipe import solver_of, solver_options
from bitwright.solvers.gptq import PATTERN
from bitwright.spec import Group, Recipe, Target

SHARE = 0.8  # of the memory that is free now: what the run may take before it re-runs blocks
SLACK = 48 << 20  # measured on a 135M model: 20 to 40 MB stay when a block is through


@dataclass(frozen=True)
class Row:
    """One matrix of the plan; scheme "float" where it is kept."""

    name: str
    shape: tuple[int, int]
    scheme: str
    bytes: int


@dataclass(frozen=True)
class Plan:
    """ram_bytes: peak resident memory, ram_base of it held already. disk_bytes: output and work
    folder together. rerun: blocks run again for each group, because the parked activations do not
    fit.
    """

    rows: tuple[Row, ...]
    tokens: int
    ram_bytes: int
    ram_base: int
    ram: Mapping[str, int]
    disk_bytes: int
    output_bytes: int
    seconds: float
    rerun: bool
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def resident_bytes(peak: bool = False) -> int:
    """Resident memory of this process now, or its highest so far (VmRSS, VmHWM)."""
    key = "VmHWM:" if peak else "VmRSS:"
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(key)), 0)


def free_bytes() -> int:
    """Memory that can be taken now: MemAvailable, less where the control groups allow less."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) << 10
    except OSError:
        pass
    allowed = cgroup.memory()
    return free if allowed is None else min(free, allowed)


class _Sizes:
    """Byte counts of a job. item: width of the forward's dtype; batch: tokens of a forward call;
    shapes: the largest (n, k) of each linear over all blocks.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.item = 2 if job.dtype == "bfloat16" else 4
        self.tokens = 0 if job.recipe.method == "rtn" else job.recipe.samples * job.recipe.length
        self.batch = min(self.tokens, job.batch * job.recipe.length)
        self.hidden = job.targets[next(iter(job.targets))].shape[1]
        self.compared = job.compare / -(-job.recipe.samples // job.batch)  # share of the batches
        self.streams = 1.0 + self.compared
        self.stream = int(self.streams * self.tokens * self.hidden * self.item)
        self.shapes: dict[str, tuple[int, int]] = {}
        for target in job.targets.values():
            n, k = self.shapes.get(target.linear.name, (0, 0))
            self.shapes[target.linear.name] = (max(n, target.shape[0]), max(k, target.shape[1]))

    def shape(self, linear: str) -> tuple[int, int]:
        return self.shapes[linear]

    def embed(self) -> int:
        skeleton, entries = self.job.skeleton, self.job.checkpoint.entries
        elsewhere = {
            *skeleton.under(skeleton.block_path),
            *(skeleton.under(skeleton.head) if skeleton.head else ()),
        }
        sources = {skeleton.sources[name] for name in skeleton.slots if name not in elsewhere}
        held = sum(math.prod(entries[source][0]) for source in sources) * self.item
        converted = [entries[s][2] for s in sources if str(entries[s][1]) != self.job.dtype]
        return held + max(converted, default=0) + self.stream

    def block(self, rerun: bool) -> int:
        arch, skeleton = self.job.arch, self.job.skeleton
        weights = max(
            sum(skeleton.slots[name].meta.numel() for name in skeleton.under(skeleton.path(i)))
            for i in range(skeleton.count)
        )
        parked = parked_bytes(arch, self.shape, self.batch if rerun else self.tokens, self.item)
        working = working_bytes(arch, self.shape, self.batch, self.item) + self._scores()
        most = 0
        for group in arch.groups:
            first = group.linears[0].name
            held = int(self.streams * parked[first]) + (self.stream if rerun else 0)
            H = (16 if self.job.compare else 8) * self.shape(first)[1] ** 2
            if self.job.sums and group.stream is not None:
                H += 16 * math.prod(self.shape(first))  # D, and its share
            most = max(most, held + H + max(working, self._solving(group)))
        return weights * self.item * (2 if self.job.compare else 1) + most

    def _scores(self) -> int:
        """A mask, and where attention is the model's own, its scores: four of them in turn, two as
        float32; v's mixed inputs, and the scores of one window's sampled queries thrice.
        """
        config = self.job.skeleton.model.config.get_text_config()
        capped = getattr(config, "attn_logit_softcapping", None) is not None
        heads = config.num_attention_heads if capped or _eager(config) else 0
        square = self.batch * self.job.recipe.length
        mixed = 0
        if self.job.mix:
            rows = config.num_attention_heads * self.job.recipe.length // self.job.mix
            windows = self.batch // self.job.recipe.length
            mixed = (
                2 * windows * rows * self.hidden * self.item + 12 * rows * self.job.recipe.length
            )
        return int(square * (1 + self.item) + heads * square * (2 * self.item + 8)) + mixed

    def _solving(self, group: Group) -> int:
        """Beside H: factor, R or scaled H; one matrix in work, the others of the group dense."""
        sizes = [math.prod(self.shape(linear.name)) for linear in group.linears]
        k = self.shape(group.linears[0].name)[1]
        scaled = self.job.recipe.method.startswith("awq") and group.norm is not None
        one = (18 if scaled else 14) + (4 if self.job.compare else 0)
        return (16 if scaled else 8) * k * k + one * max(sizes) + 4 * (sum(sizes) - max(sizes))

    def rounding(self) -> int:
        return max(16 * n * k for n, k in self.shapes.values())

    def write(self) -> int:
        largest = max(size for _, _, size in self.job.checkpoint.entries.values())
        return max(2 * largest, self.rounding())

    def output(self) -> int:
        """Bytes of the weight files, but for their headers."""
        entries, job = self.job.checkpoint.entries, self.job
        total = sum(size for _, _, size in entries.values())
        for target in job.targets.values():
            if target.scheme is not None:
                _, dtype, size = entries[job.skeleton.sources[f"{target.name}.weight"]]
                parts = job.format.layout(target.name, target.shape, target.scheme, dtype)
                total += sum(math.prod(s) * d.itemsize for d, s in parts.values()) - size
        return total

    def disk(self) -> int:
        """Finished linears (words, float32 scales, zeros, steps), and two hidden states while the
        second is written, or one and the output.
        """
        spooled = 0
        for target in self.job.targets.values():
            if target.scheme is not None:
                n, k = target.shape
                words = -(-k * target.scheme.bits // 32)
                cell = 8 if target.scheme.offset else 5  # scale and zero point
                spooled += 4 * n * (words + target.scheme.blocks(k))
                spooled += cell * n * target.scheme.groups(k)
        return spooled + self.stream + max(self.stream, self.output())


def _eager(config: Any) -> bool:
    return getattr(config, "_attn_implementation", "") == "eager"


def _stages(sizes: _Sizes, rerun: bool) -> dict[str, int]:
    if not sizes.tokens:
        return {"round": sizes.rounding(), "write": sizes.write()}
    return {"embed": sizes.embed(), "block": sizes.block(rerun), "write": sizes.write()}


def _rate(operations: float, work: Callable[[], Any]) -> float:
    """Operations per second, the best of a few runs within a tenth of a second."""
    work()
    best, end = float("inf"), time.perf_counter() + 0.1
    while time.perf_counter() < end:
        begin = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begin)
    return operations / best


def _seconds(job: Job, sizes: _Sizes) -> float:
    """Forward, Gram and solve by operation counts at measured rates; file work at 200 MB/s."""
    weights = sum(n * k for n, k in (target.shape for target in job.targets.values()))
    io = 4 * weights / 200e6
    if not sizes.tokens:
        return weights * 40 / 1e9 / job.threads + io
    k = min(sizes.hidden, 2048)
    dtype = torch.bfloat16 if job.dtype == "bfloat16" else torch.float32
    a, b = torch.ones(2048, k, dtype=dtype), torch.ones(k, k, dtype=dtype)
    forward = _rate(2 * 2048 * k * k, lambda: a @ b)
    kind = ops.BFLOAT16 if job.dtype == "bfloat16" else np.dtype(np.float32)
    X, W, H = np.ones((1024, k), kind), np.ones((256, k), np.float32), np.zeros((k, k))
    gram = _rate(1024 * k * k, lambda: ops.gram(X, H))
    solving = _rate(256 * k * k, lambda: ops.quadratic(W, H))
    columns = [
        sizes.shape(group.linears[0].name)[1]
        for group in job.arch.groups
        if not group.inside_attention
    ]
    drift = 2.0 * sizes.compared
    per_block = (1.0 + drift) * sum(float(c) ** 2 for c in columns) * sizes.tokens
    if job.sums:
        added = [sizes.shape(g.linears[0].name) for g in job.arch.groups if g.stream is not None]
        per_block += drift * sum(float(n * c) for n, c in added) * sizes.tokens
    if job.mix:
        heads = job.skeleton.model.config.get_text_config().num_attention_heads
        per_block += (1.0 + drift) * float(sizes.hidden) ** 2 * sizes.tokens * heads / job.mix
    solve = 2.0 * sum(_passes(job, t) * math.prod(t.shape) for t in job.targets.values())
    attention = 4.0 * job.recipe.length * sizes.hidden * sizes.tokens * job.skeleton.count
    overhead = 1.6  # norms, attention's softmax, activation functions, casts: measured on SmolLM2
    return (
        sizes.streams * overhead * (2.0 * weights * sizes.tokens + attention) / forward
        + per_block * job.skeleton.count / gram
        + solve / solving
        + io
    )


def _passes(job: Job, target: Target) -> float:
    """Multiply-adds of solving one matrix, per weight: products with all of H, its triangle half.

    Sweep and error measures 1.5 k; AWQ's 20 candidates 10 k; refinement 1 k each pass and one at
    the start, the drift's target 2 k; each candidate of the search half a group, and as much again
    for rounding.
    """
    if target.scheme is None:
        return 0.0
    k, options = target.shape[1], solver_options(job.recipe)
    passes = 1.5 + (10.0 if job.recipe.method.startswith("awq") else 0.0)
    if options.get("scales", "feedback") != "feedback" or solver_of(job.recipe.method) == "rtn":
        return passes * k
    passes += 1.0 + len(str(options.get("refine", PATTERN))) + (2.0 if job.compare else 0.0)
    candidates = len(ops.FEEDBACK_FACTORS) * (2 if target.scheme.symmetric else 3)
    return passes * k + candidates * min(target.scheme.columns(k), k)


def _rows(job: Job) -> tuple[Row, ...]:
    return tuple(_row(target) for target in job.targets.values())


def _row(target: Target) -> Row:
    n, k = target.shape
    if target.scheme is None:
        return Row(target.name, target.shape, "float", 2 * n * k)
    size = int(target.scheme.bits_per_weight(n, k) * n * k / 8)
    return Row(target.name, target.shape, target.scheme.name, size)


def make_for(job: Job, memory: int | None = None) -> Plan:
    """The plan of an opened job; memory: bytes it may take (None: 80 % of what is free)."""
    sizes = _Sizes(job)
    trim()
    base = resident_bytes()
    budget = int(SHARE * (free_bytes() + base)) if memory is None else memory
    stages = _stages(sizes, rerun=False)
    rerun = bool(sizes.tokens) and base + max(stages.values()) + SLACK > budget
    if rerun:
        stages = _stages(sizes, rerun=True)
    peak = base + max(stages.values()) + SLACK
    notes = list(job.notes())
    if rerun:
        notes.append("the parked activations do not fit: each block runs again for every group")
    if peak > budget:
        notes.append(f"the plan needs {peak >> 20} MB, {budget >> 20} MB may be taken")
    notes += [f"the override {pattern!r} matches no linear" for pattern in job.unused]
    return Plan(
        _rows(job),
        sizes.tokens,
        peak,
        base,
        stages,
        sizes.disk(),
        sizes.output(),
        _seconds(job, sizes) * (2.5 if rerun else 1.0),
        rerun,
        tuple(notes),
    )


def make(
    source: str | Path,
    recipe: Recipe,
    *,
    threads: int | None = None,
    dtype: Any = None,
    memory: int | None = None,
) -> Plan:
    """The plan of quantizing the checkpoint folder `source`, without reading a weight."""
    return make_for(open_job(source, recipe, dtype=dtype, threads=threads), memory)
