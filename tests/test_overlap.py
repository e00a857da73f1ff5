"""What the disk does while a block is computed: reads ahead, and writes behind, in order."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from bitwright import ops, schemes
from bitwright.calib.skeleton import Skeleton
from bitwright.demo import embedded_model
from bitwright.files import safetensors
from bitwright.files.checkpoint import Checkpoint
from bitwright.module import quantize
from bitwright.solvers import rtn
from bitwright.spec import DiskError, InputError
from bitwright.spool import Finished, Spool
from problems import weights

WISH = {"scheme": "int4-g64", "samples": 2, "length": 64, "effort": "fast"}


def finished() -> Finished:
    return Finished(*rtn.solve(weights(8, 64), None, schemes.parse("int4-g64")))


def run(spool: Spool, *names: str, failure: Exception | None = None) -> None:
    with spool:
        for name in names:
            spool.save(name, finished())
        if failure is not None:
            raise failure


@pytest.fixture
def spool(tmp_path):
    spool = Spool(tmp_path / "work")
    spool.start({"a": "b"})
    return spool


def slow_disk(monkeypatch, seconds: float = 0.2) -> list[tuple[str, str]]:
    """Files as they appear, each after a while, and the thread that waited for it."""
    seen, appear = [], safetensors._appear

    def slow(path: Path) -> None:
        time.sleep(seconds)
        appear(path)
        seen.append((path.name, threading.current_thread().name))

    monkeypatch.setattr(safetensors, "_appear", slow)
    return seen


def test_a_piece_is_waited_for_by_another_thread_and_in_order(spool, monkeypatch):
    seen = slow_disk(monkeypatch)
    with spool:
        begin = time.perf_counter()
        spool.save("first", finished())
        assert time.perf_counter() - begin < 0.2
        assert spool.has("first")  # it is not done again
        assert not seen
        spool.save("second", finished())
        assert [name for name, _ in seen] == ["first.safetensors"]
        assert spool.load("second") is not None  # a look waits
        spool.save_hidden(1, [np.zeros((2, 2), np.float32)])
    assert [name for name, _ in seen] == [
        "first.safetensors",
        "second.safetensors",
        "hidden-00001.safetensors",
    ]
    assert {thread for _, thread in seen} == {"bitwright-spool_0"}


def test_arrays_may_change_once_they_were_handed_over(spool, monkeypatch):
    slow_disk(monkeypatch)
    hidden = np.ones((3, 4), np.float32)
    with spool:
        spool.save_hidden(2, [hidden])
        hidden[:] = 7
    assert spool.hidden()[0] == 2
    np.testing.assert_array_equal(spool.hidden()[1], np.ones((1, 3, 4)))


def test_what_could_not_be_written_is_told_at_the_next_piece_or_at_the_end(spool, monkeypatch):
    def full(_path: int, _mode: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors, "_sync", full)
    with pytest.raises(DiskError, match=r"write .*one.safetensors: No space left"):
        run(spool, "one", "two")
    assert not list(spool.folder.rglob("*.safetensors*"))  # not even a .part
    again = Spool(spool.folder)
    with pytest.raises(DiskError, match=r"write .*three.safetensors: No space left"):
        run(again, "three")
    assert not list(spool.folder.rglob("three*"))


def test_a_failure_of_the_run_is_what_is_told_and_the_piece_before_it_is_kept(spool, monkeypatch):
    slow_disk(monkeypatch)
    with pytest.raises(InputError, match="the run's own"):
        run(spool, "kept", failure=InputError("the run's own"))
    assert Spool(spool.folder).has("kept")


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system cannot be told")
def test_the_next_block_is_announced_before_a_block_is_computed(tmp_path, monkeypatch):
    source = embedded_model()
    checkpoint = Checkpoint(source)
    (file,) = (safetensors.SafetensorsFile(path) for path in checkpoint.files)
    events: list[object] = []
    told, factor = os.posix_fadvise, ops.factor

    def advise(descriptor, begin, size, kind):
        events.append((begin, size, kind))
        return told(descriptor, begin, size, kind)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(ops, "factor", lambda *a, **k: events.append(0) or factor(*a, **k))
    quantize(source, out=tmp_path / "out", **WISH)
    first = events.index(0)
    skeleton = Skeleton(source, checkpoint.read, {n: e[0] for n, e in checkpoint.entries.items()})
    names = {skeleton.sources[name] for name in skeleton.under(skeleton.path(1))}
    wanted = {
        (file.entries[n].begin, file.entries[n].nbytes, os.POSIX_FADV_WILLNEED) for n in names
    }
    assert {e for e in events[:first] if e != 0} == wanted
    announced = sum(e != 0 for e in events)
    assert announced == len(names) * (skeleton.count - 1)  # the first block is read at once
