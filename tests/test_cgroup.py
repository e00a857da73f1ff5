"""Limits of control groups, files as both versions lay them out and a real group where one can be
made; and how threads wait."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from bitwright import cgroup, ops

V2 = "0::/a/b\n"
V1 = "4:memory:/a\n2:cpu,cpuacct:/a/b\n1:name=systemd:/a\n"
UNLIMITED = 9223372036854771712


def tree(folder: Path, files: Mapping[str, str], own: str) -> tuple[Path, Path]:
    mount = folder / "mount"
    for name, text in files.items():
        (mount / name).parent.mkdir(parents=True, exist_ok=True)
        (mount / name).write_text(text)
    (folder / "own").write_text(own)
    return mount, folder / "own"


@pytest.mark.parametrize(
    ("files", "own", "wanted"),
    [
        ({"a/b/cpu.max": "max 100000\n"}, V2, None),
        ({"a/b/cpu.max": "150000 100000\n"}, V2, 1.5),
        ({"a/b/cpu.max": "400000 100000", "a/cpu.max": "200000 100000"}, V2, 2.0),
        ({"cpu.max": "50000 100000"}, V2, 0.5),  # a container: its group is the mount
        ({"unified/a/cpu.max": "100000 100000"}, V2, 1.0),
        ({"cpu/a/b/cpu.cfs_quota_us": "-1", "cpu/a/b/cpu.cfs_period_us": "100000"}, V1, None),
        ({"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000"}, V1, 3.0),
        ({"cpu,cpuacct/cpu.cfs_quota_us": "7", "cpu,cpuacct/cpu.cfs_period_us": "2"}, V1, 3.5),
        ({"x/cpu.max": "100000 100000"}, V2, None),  # somebody else's
        ({"a/cpu.max": "nonsense"}, V2, None),
    ],
)
def test_cpus(tmp_path, files, own, wanted):
    assert cgroup.cpus(*tree(tmp_path, files, own)) == wanted


@pytest.mark.parametrize(
    ("files", "own", "wanted"),
    [
        ({"a/b/memory.max": "max", "a/b/memory.current": "5"}, V2, None),
        ({"a/b/memory.max": "100", "a/b/memory.current": "30"}, V2, 70),
        (
            {
                "a/memory.max": "100",
                "a/memory.current": "90",
                "a/memory.stat": "anon 50\ninactive_file 40\n",
            },
            V2,
            50,
        ),
        ({"memory.max": "10", "memory.current": "30"}, V2, 0),
        ({"memory/a/memory.limit_in_bytes": "9", "memory/a/memory.usage_in_bytes": "2"}, V1, 7),
        (
            {
                "memory/memory.limit_in_bytes": str(UNLIMITED),
                "memory/memory.usage_in_bytes": "0",
            },
            V1,
            UNLIMITED,
        ),
    ],
)
def test_memory(tmp_path, files, own, wanted):
    assert cgroup.memory(*tree(tmp_path, files, own)) == wanted


def test_no_control_groups_no_limits(tmp_path):
    assert cgroup.cpus(tmp_path, tmp_path / "none") is None
    assert cgroup.memory(tmp_path, tmp_path / "none") is None


@pytest.mark.parametrize(
    ("allowed", "wanted"), [(None, 3), (0.3, 1), (1.0, 1), (1.2, 2), (64.0, 3)]
)
def test_threads_are_as_many_as_both_allow(monkeypatch, allowed, wanted):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1, 2}, raising=False)
    monkeypatch.setattr(cgroup, "cpus", lambda: allowed)
    assert ops.available_cpus() == wanted


@pytest.fixture
def one_cpu() -> Iterator[Path]:
    """A real group with one CPU's worth of time, of whichever version is mounted."""
    name = f"bitwright-{os.getpid()}"
    for base, limits in (
        (Path("/sys/fs/cgroup/cpu"), {"cpu.cfs_period_us": "20000", "cpu.cfs_quota_us": "20000"}),
        (Path("/sys/fs/cgroup"), {"cpu.max": "20000 20000"}),
    ):
        folder = base / name
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            for file, text in limits.items():
                (folder / file).write_text(text)
            yield folder
            return
        except OSError:
            continue
        finally:
            for _ in range(50):
                try:
                    folder.rmdir()
                    break
                except OSError:
                    time.sleep(0.1)
    pytest.skip("this user may not make a control group")


WORK = """
import json, os, sys, time
from pathlib import Path
if sys.argv[1]:
    (Path(sys.argv[1]) / "cgroup.procs").write_text(str(os.getpid()))
import numpy as np
from bitwright import ops
if not sys.argv[1]:
    ops.set_threads(1)
X, H = np.ones((2048, 1024), np.float32), np.zeros((1024, 1024))
best = 1e9
for _ in range(6):
    begin = time.perf_counter()
    for _ in range(4):
        ops.gram(X, H)
    best = min(best, time.perf_counter() - begin)
print(json.dumps([ops.threads(), best]))
"""


def work(folder: str) -> tuple[int, float]:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", WORK, folder],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    count, seconds = json.loads(done.stdout)
    return count, seconds


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU is no limit here")
def test_a_group_of_one_cpu_gives_one_thread_and_what_one_thread_does(one_cpu):
    """Two threads in it would wait for each other's share: the work takes as long as on one thread
    outside, within the noise of a shared machine."""
    (count, inside), (_, outside) = work(str(one_cpu)), work("")
    assert count == 1
    assert inside < 2.5 * outside


WAITING = {
    "load": "import bitwright; bitwright.load({folder!r})",
    "quantize": "import bitwright; bitwright.quantize",
    "hub": "import bitwright.hf",
    "numpy": "import bitwright; bitwright.parse_scheme('int4-g64'); import bitwright.ops",
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libgomp tells its settings")
@pytest.mark.parametrize("way", WAITING)
def test_threads_wait_passively_whoever_loads_openmp(quantized, way):
    """torch's library and ours are one; it is told before the first of them is loaded."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    for wish in (None, "active"):
        chosen = {} if wish is None else {"OMP_WAIT_POLICY": wish}
        done = subprocess.run(
            [sys.executable, "-c", WAITING[way].format(folder=str(quantized))],
            env={**environment, **chosen, "OMP_DISPLAY_ENV": "verbose"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        spins = re.findall(r"GOMP_SPINCOUNT = '(\w+)'", done.stderr)
        assert spins
        assert (set(spins) == {"0"}) == (wish is None)
