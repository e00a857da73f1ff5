"""What a run will take, before it starts: memory, disk, time, and the scheme of each matrix.

Peak memory is the largest of the run's stages (sizes.py) on top of what Python and the libraries
hold already, and a constant for stacks, libraries' scratch space and the heap. Time is measured in
parts at the model's shapes (estimate.py). A config.json is enough: names and shapes of the weights
are those of the model that it describes, their dtype is the config's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitwright import cgroup
from bitwright.calib import device as devices
from bitwright.calib.memory import resident_bytes, trim
from bitwright.estimate import Estimate
from bitwright.files.checkpoint import without_weights
from bitwright.job import Job, open_job, outline_job
from bitwright.pool import limited
from bitwright.sizes import Sizes
from bitwright.spec import Recipe, Target

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
    """ram_bytes: peak resident memory, ram_base of it held already, ram_passing what comes and goes
    within a block; ram: of each stage, block: of a block at each of its groups, beside what is held
    already. disk_bytes: output and work folder together. parts:
    seconds by phase (clock.py). rerun: blocks run again for each group, because the parked
    activations do not fit. device: what runs the forward and the sums, device_bytes: memory that
    it takes there, 0 for the CPU.
    """

    rows: tuple[Row, ...]
    tokens: int
    ram_bytes: int
    ram_base: int
    ram_passing: int
    ram: Mapping[str, int]
    block: Mapping[str, int]
    disk_bytes: int
    output_bytes: int
    seconds: float
    parts: Mapping[str, float]
    rerun: bool
    notes: tuple[str, ...]
    device: str = "cpu"
    device_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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


def _rows(job: Job) -> tuple[Row, ...]:
    return tuple(_row(target) for target in job.targets.values())


def _row(target: Target) -> Row:
    n, k = target.shape
    if target.scheme is None:
        return Row(target.name, target.shape, "float", 2 * n * k)
    size = int(target.scheme.bits_per_weight(n, k) * n * k / 8)
    return Row(target.name, target.shape, target.scheme.name, size)


def make_for(job: Job, memory: int | None = None, timed: bool = True) -> Plan:
    """The plan of an opened job; memory: bytes it may take (None: 80 % of what is free); timed:
    whether it is to tell seconds, which takes some."""
    sizes = Sizes(job)
    trim()
    base = resident_bytes()
    budget = int(SHARE * (free_bytes() + base)) if memory is None else memory
    on_device = job.device.type != "cpu" and sizes.tokens > 0
    stages = sizes.stages(rerun=False)
    if on_device:
        room = int(SHARE * devices.free_bytes(job.device))
        rerun = sizes.on_device(rerun=False) > room
    else:
        rerun = bool(sizes.tokens) and base + max(stages.values()) + SLACK > budget
    if rerun:
        stages = sizes.stages(rerun=True)
    peak = base + max(stages.values()) + SLACK
    there = sizes.on_device(rerun) if on_device else 0
    notes = list(job.notes())
    if on_device and there > room:
        notes.append(f"the plan needs {there >> 20} MB of the GPU, {room >> 20} MB may be taken")
    if rerun:
        notes.append("the parked activations do not fit: each block runs again for every group")
    if peak > budget:
        notes.append(f"the plan needs {peak >> 20} MB, {budget >> 20} MB may be taken")
    notes += [f"the override {pattern!r} matches no linear" for pattern in job.unused]
    parts = Estimate(job, sizes, rerun).seconds() if timed else {}
    return Plan(
        _rows(job),
        sizes.tokens,
        peak,
        base,
        max(sizes.passing(rerun).values()) if sizes.tokens else 0,
        stages,
        sizes.groups(rerun) if sizes.tokens else {},
        sizes.disk(),
        sizes.output(),
        sum(parts.values()),
        parts,
        rerun,
        tuple(notes),
        devices.label(job.device),
        there,
    )


@devices.guarded()
def make(
    source: str | Path,
    recipe: Recipe,
    *,
    threads: int | None = None,
    dtype: Any = None,
    memory: int | None = None,
    device: str | None = None,
) -> Plan:
    """The plan of quantizing a checkpoint folder, without reading a weight; `source` may be a
    config.json, or a folder with nothing else."""
    config = without_weights(Path(source))
    if config is None:
        job = open_job(source, recipe, dtype=dtype, threads=threads, device=device)
    else:
        job = outline_job(config, recipe, dtype=dtype, threads=threads, device=device)
    with limited(job.threads):
        return make_for(job, memory)
