"""How many threads the ops use."""

from __future__ import annotations

import math
import os

from bitwright import _core, cgroup
from bitwright.spec import InputError

isa = _core.isa
levels = _core.levels
multiplies_bf16 = _core.multiplies_bf16
threads = _core.threads
panel_rows = _core.panel_rows  # that a thread solves at a time, of a matrix of so many


def available_cpus() -> int:
    """CPUs this process may use: its affinity mask, less where its control groups allow less."""
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    allowed = cgroup.cpus()
    return cpus if allowed is None else min(cpus, max(1, math.ceil(allowed)))


def resolve_threads(n: int | None = None) -> int:
    """The threads that n asks for; None: OMP_NUM_THREADS where set, else all available CPUs."""
    if n is None:
        wish = os.environ.get("OMP_NUM_THREADS", "")
        return max(1, int(wish)) if wish.isdigit() else available_cpus()
    if n < 1:
        raise InputError(f"[threads] wanted at least 1 thread, got {n}")
    return n


def set_threads(n: int | None = None) -> int:
    """Sets the threads of every op, as `resolve_threads` says, and returns the number."""
    n = resolve_threads(n)
    _core.set_threads(n)
    return n


set_threads()
