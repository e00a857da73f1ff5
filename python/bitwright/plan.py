"""What a run will take, before it starts: memory, disk, time, and the scheme of each matrix.

Peak memory is the largest of the run's stages, on top of what Python and the libraries hold
already:

    embed     embeddings, twice for a moment while their dtype changes, and the hidden states
    block     weights of one block, hidden states, activations parked at a group (or, where those do
              not fit, one batch at a time: the block then runs again for each group), working space
              of one forward call, and for the group being solved, with k columns and n rows,
                  k^2 (8 H + 4 factor + 4 R + 4 slices of R)  and  13 n k (W, E, codes, Q)
    write     the largest tensor twice, as read and as written; a matrix, its codes, its packed form

each a tenth more for the holes that the heap is left with, and a constant for stacks.

Time is the forward, the Gram sums and the solve by their operation counts (solver.md 2), at rates
measured for a fraction of a second each.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitwright import ops
from bitwright.calib.memory import parked_bytes, trim
from bitwright.job import TOKENS_PER_BATCH, Job, open_job
from bitwright.spec import Recipe, Target

SHARE = 0.8  # of the memory that is free now: what the run may take before it re-runs blocks
HOLES = 1.1  # measured on a 135M model: peaks are 2 to 9 % above the sum of what is held
SLACK = 64 << 20  # allocator and thread stacks


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
    """Memory that can be taken now: MemAvailable, less where the cgroup (v2) allows less."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) << 10
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free, int(limit) - used) if limit.isdigit() else free
    except OSError:
        pass
    return free


class _Sizes:
    """Byte counts of a job; `item` is the width of the forward's dtype."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.item = 2 if job.dtype == "bfloat16" else 4
        self.tokens = 0 if job.recipe.method == "rtn" else job.recipe.samples * job.recipe.length
        skeleton = job.skeleton
        self.blocks = [self._elements(skeleton.path(i)) for i in range(skeleton.count)]
        self.outside = self._elements("") - sum(self.blocks)
        self.hidden = job.targets[next(iter(job.targets))].shape[1]

    def _elements(self, prefix: str) -> int:
        slots = self.job.skeleton.slots
        return sum(slots[name].meta.numel() for name in self.job.skeleton.under(prefix))

    def shape(self, linear: str) -> tuple[int, int]:
        return self.job.targets[f"{self.job.skeleton.path(0)}.{linear}"].shape

    def stream(self) -> int:
        return self.tokens * self.hidden * self.item

    def parked(self) -> int:
        return max(parked_bytes(self.job.arch, self.shape, self.tokens, self.item).values())

    def widest(self) -> int:
        return max(sum(target.shape) for target in self.job.targets.values())

    def forward_space(self) -> int:
        """A few activations of the widest linear of one forward call, and what it multiplies in."""
        rows = max(TOKENS_PER_BATCH, self.job.recipe.length)
        return 3 * rows * self.widest() * self.item

    def solving(self) -> int:
        """The most that one group takes while it is solved."""
        targets = self.job.targets.values()
        return max(20 * k * k + 13 * n * k for n, k in (target.shape for target in targets))

    def rounding(self) -> int:
        return max(16 * n * k for n, k in (target.shape for target in self.job.targets.values()))

    def writing(self) -> int:
        return max(
            2 * max(size for _, _, size in self.job.checkpoint.entries.values()), self.rounding()
        )


def _stages(sizes: _Sizes, rerun: bool) -> dict[str, int]:
    block = max(sizes.blocks) * sizes.item
    outside = int(sizes.outside) * sizes.item
    if not sizes.tokens:
        return {"write": int(HOLES * sizes.writing())}
    held = 2 * sizes.stream() if rerun else max(sizes.parked(), 2 * sizes.stream())
    stages = {
        "embed": 2 * outside + sizes.stream(),
        "block": block + held + sizes.forward_space() + sizes.solving(),
        "write": sizes.writing(),
    }
    return {name: int(HOLES * count) for name, count in stages.items()}


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
    X, H = np.ones((1024, k), np.float32), np.zeros((k, k))
    gram = _rate(1024 * k * k, lambda: ops.gram(X, H))
    columns = [
        sizes.shape(group.linears[0].name)[1]
        for group in job.arch.groups
        if not group.inside_attention
    ]
    per_block = sum(float(c) ** 2 for c in columns) * sizes.tokens
    solve = sum(3.0 * n * c * c for n, c in (t.shape for t in job.targets.values()))
    attention = 4.0 * job.recipe.length * sizes.hidden * sizes.tokens * job.skeleton.count
    overhead = 1.6  # norms, attention's softmax, activation functions, casts: measured on SmolLM2
    return (
        overhead * (2.0 * weights * sizes.tokens + attention) / forward
        + (per_block * job.skeleton.count + solve) / gram
        + io
    )


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
    rows = _rows(job)
    quantized = sum(row.bytes for row in rows if row.scheme != "float")
    weights = sum(t.shape[0] * t.shape[1] for t in job.targets.values() if t.scheme is not None)
    output = int(job.checkpoint.total_bytes - 2 * weights + quantized)
    notes = list(job.notes())
    if rerun:
        notes.append("the parked activations do not fit: each block runs again for every group")
    if peak > budget:
        notes.append(f"the plan needs {peak >> 20} MB, {budget >> 20} MB may be taken")
    notes += [f"the override {pattern!r} matches no linear" for pattern in job.unused]
    return Plan(
        rows,
        sizes.tokens,
        peak,
        base,
        stages,
        output + quantized + 2 * sizes.stream(),
        output,
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
