"""A disk that fills up, and checkpoints by hub id, through the real door.

Full disks are a tiny tmpfs where this may mount one, and everywhere a limit on the size of files.
Either way: InputError, and neither a half OUT folder nor a half file.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import bitwright
import tiny_models
from bitwright.files import safetensors as container
from bitwright.spec import InputError

WISH = {"scheme": "int4-g32", "method": "rtn"}
LIMITED = """
import json, os, resource, sys
import bitwright
from bitwright import module  # imports are through before the limit
source, out = sys.argv[1:3]
for limit in sys.argv[3:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    try:
        bitwright.quantize(source, out=out, scheme="int4-g32", method="rtn")
    except bitwright.InputError as error:
        print(json.dumps([str(error), os.path.exists(out)]))
"""
FROM_HUB = """
import json, sys
import bitwright
from bitwright.files.hub import resolve
try:
    print(json.dumps(str(resolve(sys.argv[1]))))
    bitwright.quantize(sys.argv[1], out=sys.argv[2], scheme="int4-g32", method="rtn")
except bitwright.InputError as error:
    print(json.dumps("InputError: " + str(error)))
"""


def run(script: str, *arguments: object, **environment: str) -> list[str]:
    """The lines, JSON each, that a script prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tiny_models.make("llama"), tmp_path_factory.mktemp("disk") / "base")


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "full"
    folder.mkdir()
    mount, umount = shutil.which("mount"), shutil.which("umount")
    options = ["-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if not mount or not umount or subprocess.run([mount, *options], check=False).returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield folder
    subprocess.run([umount, str(folder)], check=True)


def test_a_full_disk_leaves_no_half_file(full):
    arrays = {f"t{i}": np.zeros(8192, np.uint8) for i in range(12)}
    with pytest.raises(InputError, match=r"could not write .*a\.safetensors: No space left"):
        container.save(full / "a.safetensors", arrays, {})
    assert not list(full.iterdir())


def test_a_disk_that_fills_up_while_the_result_is_written(full, base, tmp_path):
    out = full / "out"
    (full / "ballast").write_bytes(b"\0" * 16_384)
    with pytest.raises(InputError, match=r"could not write .*: No space left on device$"):
        bitwright.quantize(base, out=out, work=tmp_path / "work", **WISH)
    assert [path.name for path in full.iterdir()] == ["ballast"]
    (full / "ballast").unlink()
    bitwright.quantize(base, out=out, work=tmp_path / "work", **WISH)


def test_a_disk_that_fills_up_while_linears_are_finished(full, base):
    out = full / "out"
    (full / "ballast").write_bytes(b"\0" * 40_960)
    with pytest.raises(InputError, match=r"could not write .*: No space left on device$"):
        bitwright.quantize(base, out=out, **WISH)
    assert not out.exists()
    assert not list(full.rglob("*.part"))


def test_files_that_may_not_grow(base, tmp_path):
    """First a finished linear, then the result is too large; what was finished serves later."""
    out = tmp_path / "out"
    sentences = run(LIMITED, base, out, 1_000, 10_000)
    assert [exists for _, exists in sentences] == [False, False]
    for said, file in zip((s for s, _ in sentences), ("out.work/linears", "out.part"), strict=True):
        assert said.startswith(f"[write] could not write {tmp_path}/{file}")
        assert said.endswith("File too large")
    assert not list(tmp_path.rglob("*.part"))
    bitwright.quantize(base, out=out, **WISH)
    assert not (tmp_path / "out.work").exists()


def cache_of(base: Path, folder: Path) -> Path:
    """A hub cache with one model, as huggingface_hub lays it out."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    home = folder / "models--org--tiny"
    shutil.copytree(base, home / "snapshots" / revision)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(revision)
    return home / "snapshots" / revision


def test_a_hub_id_is_found_in_the_cache(base, tmp_path):
    snapshot = cache_of(base, tmp_path / "cache")
    offline = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    (found,) = run(FROM_HUB, "org/tiny", tmp_path / "out", **offline)
    assert found == str(snapshot)
    direct = tmp_path / "direct"
    bitwright.quantize(base, out=direct, **WISH)
    files = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "out", direct)]
    assert files[0] == files[1]


def test_an_unknown_hub_id_is_one_sentence(tmp_path):
    offline = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    (said,) = run(FROM_HUB, "org/none", tmp_path / "out", **offline)
    assert "org/none is no folder here and could not be fetched from the hub: " in said
    assert "\n" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["/nowhere/at/all", "a b", "one/two/three", "https://x.y/z"])
def test_what_is_neither_a_folder_nor_an_id(source, tmp_path):
    with pytest.raises(InputError, match=r"wanted a folder or a hub id like org/name, got"):
        bitwright.quantize(source, out=tmp_path / "out", method="rtn")


def test_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"wanted a folder or a hub id, got the file"):
        bitwright.quantize(tmp_path / "model.safetensors", out=tmp_path / "out", method="rtn")
