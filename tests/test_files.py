"""Files and folders: what is written reads back, and what lies is found before it is used.

Containers are compared with the safetensors library in both directions. Hostile files and folders
must end in an InputError of one sentence, never in a traceback, a huge allocation or foreign code.
"""

from __future__ import annotations

import json
import pickle
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

import bitwright
import tiny_models
from bitwright.files import safetensors as container
from bitwright.files.checkpoint import INDEX, Checkpoint, copy_side_files, write_checkpoint
from bitwright.files.safetensors import DTYPES, SafetensorsFile
from bitwright.spec import InputError

LAYOUT = {f"t{i}": (np.dtype(np.float32), (i + 1, 8)) for i in range(6)}
ONE_SENTENCE = r"^\[\w+\] [^\n]+[^.\n]$"


def random(dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Any bytes, NaNs of every kind included; truth values where they are meant."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.random.default_rng(0).integers(0, 256, size).astype(np.uint8)
    return (raw % 2 if dtype == np.bool_ else raw).view(dtype).reshape(shape)


def arrays() -> dict[str, np.ndarray]:
    shapes = ((3, 5), (), (0, 4), (7,), (2, 3, 4))
    return {
        f"{name}.{len(shape)}{min(shape, default=1)}": random(dtype, shape)
        for name, dtype in DTYPES.items()
        for shape in shapes
    }


def raw(array: np.ndarray) -> bytes:
    return array.tobytes()


def test_round_trip_of_every_dtype(tmp_path):
    path, want = tmp_path / "a.safetensors", arrays()
    container.save(path, want, {"format": "pt", "größe": "naïve"})
    file = SafetensorsFile(path)
    assert file.metadata == {"format": "pt", "größe": "naïve"}
    assert list(file.entries) == list(want)
    for name, array in want.items():
        got = file.read(name)
        assert (got.dtype, got.shape, raw(got)) == (array.dtype, array.shape, raw(array))
        assert got.flags.writeable
    with pytest.raises(InputError, match="wanted tensor nope in"):
        file.read("nope")


def torch_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_the_library_reads_what_we_write(tmp_path):
    path, want = tmp_path / "a.safetensors", arrays()
    container.save(path, want, {"format": "pt"})
    got = safetensors.torch.load_file(path)
    assert set(got) == set(want)
    for name, array in want.items():
        assert tuple(got[name].shape) == array.shape
        assert torch_bytes(got[name]) == raw(array)


def test_rows_are_read_when_they_are_asked_for(tmp_path):
    """All in the same memory; the reader's clock runs for each."""
    path, want, times = tmp_path / "model.safetensors", random(np.dtype(np.int32), (70, 5)), []
    container.save(path, {"a": random(np.dtype(np.int8), (3,)), "w": want}, {})
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint(tmp_path)

    @contextmanager
    def watch():
        times.append(0)
        yield

    checkpoint.reading = watch
    rows = checkpoint.rows("w").view(np.uint32)
    assert (rows.dtype, rows.shape, times) == (np.uint32, (70, 5), [])
    first = rows[0:32]
    assert np.array_equal(first.view(np.int32), want[:32])
    second = rows[64:96]
    assert np.array_equal(second.view(np.int32), want[64:])
    assert np.shares_memory(first, second)
    assert np.array_equal(rows[:].view(np.int32), want)
    assert len(times) == 3
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="ends inside tensor w"):
        rows[64:70]
    with pytest.raises(InputError, match="wanted tensor nope in"):
        checkpoint.rows("nope")
    with pytest.raises(InputError, match="wanted tensor nope in"):
        SafetensorsFile.rows(checkpoint._file("a"), "nope")


def test_we_read_what_the_library_writes(tmp_path):
    path = tmp_path / "a.safetensors"
    dtypes = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool)
    generator = torch.Generator().manual_seed(0)
    want = {str(d): torch.randn(5, 3, generator=generator).to(d) for d in dtypes}
    safetensors.torch.save_file(want, path, metadata={"format": "pt"})
    file = SafetensorsFile(path)
    for name, tensor in want.items():
        got = file.read(name)
        assert got.shape == tuple(tensor.shape)
        assert raw(got) == torch_bytes(tensor)
        assert np.array_equal(got.astype(np.float32), tensor.float().numpy())


def hostile(header: object, data: bytes = b"\0" * 16) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: object = (2,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = {"a": entry(0, 8), "b": entry(8, 16)}
HOSTILE = {
    "empty file": (b"", "got one of 0"),
    "four bytes": (b"\x08\0\0\0", "wanted a header inside the 4 bytes"),
    "cut header": (hostile(GOOD)[:40], "wanted a header inside"),
    "cut data": (hostile(GOOD)[:-1], "cut short"),
    "header beyond the file": ((999).to_bytes(8, "little") + b"{}", "got one of 999"),
    "huge header": ((2**63).to_bytes(8, "little") + b"{}", f"got one of {2**63}"),
    "not JSON": (hostile(b"{nope"), "not valid JSON"),
    "not UTF-8": (hostile(b'{"\xff\xfe": 1}'), "not valid JSON"),
    "bottomless": (hostile(b"[" * 200_000), "not valid JSON"),
    "not an object": (hostile([1, 2]), "wanted a JSON object as header"),
    "entry is no object": (hostile({"a": 7}), "wanted dtype"),
    "a name twice": (hostile(b'{"a": {}, "a": {}}'), "'a' stands there twice"),
    "a key twice": (hostile(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "'dtype' stands there"),
    "overlap": (hostile({"a": entry(0, 8), "b": entry(4, 12)}), "b .* overlaps"),
    "the same bytes twice": (hostile({"a": entry(0, 8), "b": entry(0, 8)}, b"\0" * 8), "overlaps"),
    "hole": (hostile({"a": entry(0, 8), "b": entry(12, 20)}, b"\0" * 20), "b .* leaves a hole"),
    "hole at the start": (hostile({"a": entry(8, 16)}), "a .* leaves a hole"),
    "offset beyond the end": (hostile({"a": entry(0, 8), "b": entry(8, 16)}, b"\0" * 8), "cut sho"),
    "negative offset": (hostile({"a": entry(-8, 0)}), "wanted dtype"),
    "backwards": (hostile({"a": entry(8, 0)}), "wanted 8 bytes for a"),
    "wrong byte count": (hostile({"a": entry(0, 16)}), "wanted 8 bytes for a"),
    "unknown dtype": (hostile({"a": entry(0, 16, (2,), "F128")}), r"wanted dtype \(BOOL, .*F128"),
    "negative shape": (hostile({"a": entry(0, 16, (-2, -2))}), "wanted dtype"),
    "shape of text": (hostile({"a": entry(0, 16, "22")}), "wanted dtype"),
    "shape of truth": (hostile({"a": entry(0, 4, (True,))}), "wanted dtype"),
    "shape of fractions": (hostile({"a": entry(0, 16, (4.0,))}), "wanted dtype"),
    "overflowing shape": (hostile({"a": entry(0, 16, (2**62, 4))}), "wanted 73786976294838206464"),
    "three offsets": (hostile({"a": {**entry(0, 8), "data_offsets": [0, 8, 16]}}), "wanted dtype"),
    "endless entry": (hostile({"a": entry(0, 8, [-1] * 9999)}), "wanted dtype .{,600}$"),
    "trailing bytes": (hostile(GOOD, b"\0" * 17), "followed by bytes that belong to no tensor"),
    "metadata of numbers": (hostile({"__metadata__": {"a": 1}}, b""), "wanted text values"),
    "metadata of lists": (hostile({"__metadata__": []}, b""), "wanted text values"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(tmp_path, name):
    content, sentence = HOSTILE[name]
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=sentence) as caught:
        SafetensorsFile(path)
    assert caught.match(ONE_SENTENCE)
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_opened_or_shrink(tmp_path):
    with pytest.raises(InputError, match=r"could not open .*: No such file"):
        SafetensorsFile(tmp_path / "none")
    with pytest.raises(InputError, match=r"could not open .*: Is a directory"):
        SafetensorsFile(tmp_path)
    path = tmp_path / "a.safetensors"
    path.write_bytes(hostile(GOOD))
    file = SafetensorsFile(path)
    path.write_bytes(hostile(GOOD)[:-1])
    with pytest.raises(InputError, match="ends inside tensor b"):
        file.read("b")


def produce(name: str) -> np.ndarray:
    return random(*LAYOUT[name])


def folder_with(tmp_path: Path, largest: int = 10**9) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    write_checkpoint(folder, LAYOUT, produce, largest)
    return folder


def test_a_checkpoint_in_one_file(tmp_path):
    checkpoint = Checkpoint(folder_with(tmp_path))
    assert [file.name for file in checkpoint.files] == ["model.safetensors"]
    assert list(checkpoint.entries) == list(LAYOUT)
    assert all(raw(checkpoint.read(name)) == raw(produce(name)) for name in LAYOUT)


@pytest.mark.parametrize(("largest", "files"), [(300, 3), (100, 5), (1, 6), (10**6, 1)])
def test_a_checkpoint_in_shards(tmp_path, largest, files):
    """As many as needed, a larger tensor in a file of its own, nothing lost, sizes told."""
    folder = folder_with(tmp_path, largest)
    checkpoint = Checkpoint(folder)
    assert len(checkpoint.files) == files
    assert list(checkpoint.entries) == list(LAYOUT)
    assert all(raw(checkpoint.read(name)) == raw(produce(name)) for name in LAYOUT)
    if files > 1:
        index = json.loads((folder / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(produce(name).nbytes for name in LAYOUT)
        assert set(index["weight_map"]) == set(LAYOUT)
        names = {f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)}
        assert {file.name for file in checkpoint.files} == names
    assert not list(folder.glob("*.part"))


def edit_index(folder: Path, **changes: object) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


SHARD = "model-00001-of-00003.safetensors"


def lose_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def lose_shard(folder: Path) -> None:
    (folder / SHARD).unlink()


def lose_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


def repeat_tensor(folder: Path) -> None:
    container.save(folder / "extra.safetensors", {"t5": produce("t5")}, {})
    edit_index(folder, more="extra.safetensors")


def text_map(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": "model.safetensors"}')


FOLDERS = {
    lose_config: "wanted a folder with a config.json, got",
    break_config: "could not read .*config.json",
    list_config: "wanted a JSON object in .*config.json, got list",
    lose_shard: f"names {SHARD}, which is missing",
    lose_weights: "wanted model.safetensors or model.safetensors.index.json in",
    repeat_tensor: "tensor t5 lies both in extra.safetensors and in model-00003",
    text_map: "wanted a weight_map of file names",
    lambda folder: edit_index(folder, t4=SHARD): "puts tensor t4 in .*, but it lies in model-00002",
    lambda folder: edit_index(folder, t6=SHARD): "puts tensor t6 in .*, but no shard has it",
    lambda folder: edit_index(
        folder, t5="../model.safetensors"
    ): "wanted a weight_map of file names",
    lambda folder: edit_index(folder, t5="/etc/passwd"): "wanted a weight_map of file names",
    lambda folder: edit_index(folder, t5=".."): "names .., which is missing",
    lambda folder: edit_index(folder, t5=7): "wanted a weight_map of file names",
}


@pytest.mark.parametrize("attack", FOLDERS)
def test_folders_that_lie(tmp_path, attack):
    folder = folder_with(tmp_path, 300)
    attack(folder)
    with pytest.raises(InputError, match=FOLDERS[attack]) as caught:
        Checkpoint(folder)
    assert caught.match(ONE_SENTENCE)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self):
        return Path.touch, (self.sprung,)


def test_pickles_are_named_with_the_converting_command_and_never_opened(tmp_path):
    folder, sprung = tmp_path / "model", tmp_path / "sprung"
    tiny_models.save(tiny_models.make("llama"), folder)
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pth", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Trap(sprung)))
    command = r"M\.from_pretrained\('.*/model'\)\.save_pretrained\('OUT'\)"
    with pytest.raises(InputError, match=command) as caught:
        bitwright.quantize(folder, out=tmp_path / "out", method="rtn")
    assert "\n" not in str(caught.value)
    assert not sprung.exists()
    assert not (tmp_path / "out").exists()


def test_side_files_come_along_but_no_code_and_no_weights(tmp_path):
    source, out = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    out.mkdir()
    kept = {"tokenizer.json", "tokenizer_config.json", "LICENSE", "generation_config.json"}
    for name in (*kept, "modeling.py", "tokenizer.py", "tokenizer.bin", "extra.safetensors"):
        (source / name).write_text("x")
    copy_side_files(source, out)
    assert {path.name for path in out.iterdir()} == kept


def failing(name: str) -> np.ndarray:
    if name == "t3":
        raise RuntimeError("no more")
    return produce(name)


def wrong(name: str) -> np.ndarray:
    return produce(name).astype(ml_dtypes.bfloat16 if name == "t3" else np.float32)


def test_a_failing_producer_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.safetensors"
    for old in (None, b"old"):
        if old is not None:
            path.write_bytes(old)
        with pytest.raises(RuntimeError, match="no more"):
            container.write(path, LAYOUT, failing, {})
        with pytest.raises(InputError, match=r"wanted t3 as float32 .* got bfloat16"):
            container.write(path, LAYOUT, wrong, {})
        assert [p.read_bytes() for p in tmp_path.iterdir()] == ([] if old is None else [old])


def test_shards_of_a_quantized_model(tmp_path):
    """Through the door: several files with an index hold what one file holds."""
    base, out, one = (tmp_path / name for name in ("base", "out", "one"))
    tiny_models.save(tiny_models.make("llama"), base)
    wish = {"scheme": "int4-g32", "method": "rtn"}
    bitwright.quantize(base, out=out, max_shard_size=20_000, **wish)
    bitwright.quantize(base, out=one, **wish)
    many, single = Checkpoint(out), Checkpoint(one)
    assert len(many.files) > 2
    for file in many.files:
        assert sum(entry.nbytes for entry in SafetensorsFile(file).entries.values()) <= 20_000
    assert set(many.entries) == set(single.entries)
    assert all(raw(many.read(name)) == raw(single.read(name)) for name in many.entries)
