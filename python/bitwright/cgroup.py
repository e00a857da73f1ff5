"""What the control groups of this process allow, Linux versions 1 and 2: CPUs and memory.

/proc/self/cgroup names the process's group in each hierarchy; a limit of any group above holds as
well. In a container the mount may begin at the container's own group, then the folder of that name
is not there and the mount itself is the group.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def _folders(controller: str, mount: Path, own: Path) -> Iterator[Path]:
    """Folders of this process's groups that may limit `controller`, innermost first."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        bases = (
            (mount / controller, mount / controllers) if controllers else (mount, mount / "unified")
        )
        for base in dict.fromkeys(bases):
            inside = Path(group.lstrip("/"))
            yield from (base / part for part in (inside, *inside.parents))


def _numbers(folder: Path, *names: str) -> tuple[int, ...] | None:
    """The numbers in files of a folder; None where a file is missing or says max."""
    try:
        words = [word for name in names for word in (folder / name).read_text().split()]
        return tuple(int(word) for word in words)
    except (OSError, ValueError):
        return None


def cpus(mount: Path = MOUNT, own: Path = OWN) -> float | None:
    """CPUs' worth of time that the groups allow, None without a limit."""
    found = []
    for folder in _folders("cpu", mount, own):
        limit = _numbers(folder, "cpu.max") or _numbers(
            folder, "cpu.cfs_quota_us", "cpu.cfs_period_us"
        )
        if limit and limit[0] > 0 and limit[1] > 0:
            found.append(limit[0] / limit[1])
    return min(found, default=None)


def _reclaimable(folder: Path) -> int:
    """Bytes of file cache that the system takes back before anything else."""
    try:
        fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))
    except (OSError, ValueError):
        return 0


def memory(mount: Path = MOUNT, own: Path = OWN) -> int | None:
    """Bytes that the groups still allow this process to take, None without a limit."""
    found = []
    for folder in _folders("memory", mount, own):
        use = _numbers(folder, "memory.max", "memory.current") or _numbers(
            folder, "memory.limit_in_bytes", "memory.usage_in_bytes"
        )
        if use:
            found.append(max(0, use[0] - use[1] + _reclaimable(folder)))
    return min(found, default=None)
