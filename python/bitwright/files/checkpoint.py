"""A Hugging Face checkpoint folder: config.json and one or more safetensors files.

Several files come with model.safetensors.index.json, whose weight_map says which file has which
tensor; the map is checked against the headers. Nothing in a folder is ever executed or unpickled.

An `Outline` is a checkpoint of which only the config is there: the names and shapes of its tensors
are told by who knows the model, their dtype is the config's.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from bitwright.files import safetensors
from bitwright.files.safetensors import Layout, Rows, SafetensorsFile
from bitwright.spec import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SIDE_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "spiece.model", "chat_template*", "generation_config.json", "preprocessor_config.json",
    "processor_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
FLOATS: Mapping[str, npt.DTypeLike] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; InputError if it is anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"[checkpoint] could not read {path}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(
            f"[checkpoint] wanted a JSON object in {path}, got {type(content).__name__}"
        )
    return content


class Checkpoint:
    """An opened folder. entries: tensor name -> (shape, dtype, bytes). files: the weight files.
    reading: entered around every read, for whoever keeps the time."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.reading: Callable[[], AbstractContextManager[None]] = nullcontext
        if not (self.path / "config.json").is_file():
            raise InputError(f"[checkpoint] wanted a folder with a config.json, got {path}")
        self.config = _config(self.path / "config.json")
        self.files = _weight_files(self.path)
        self._home: dict[str, SafetensorsFile] = {}
        for file in (SafetensorsFile(file) for file in self.files):
            for name in file.entries:
                if name in self._home:
                    raise InputError(
                        f"[checkpoint] tensor {name} lies both in {self._home[name].path.name} and "
                        f"in {file.path.name} of {path}"
                    )
                self._home[name] = file
        self._check_index()
        self.entries: dict[str, tuple[tuple[int, ...], np.dtype[Any], int]] = {
            name: (entry.shape, entry.dtype, entry.nbytes)
            for name, file in self._home.items()
            for entry in (file.entries[name],)
        }

    def _check_index(self) -> None:
        if not (self.path / INDEX).is_file():
            return
        for name, shard in _weight_map(self.path).items():
            home = self._home.get(name)
            if home is None or home.path.name != shard:
                where = "no shard has it" if home is None else f"it lies in {home.path.name}"
                raise InputError(f"[checkpoint] {INDEX} puts tensor {name} in {shard}, but {where}")

    @property
    def total_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(file.stat().st_size for file in self.files)

    def announce(self, names: Iterable[str]) -> None:
        """Tensors that are read soon: the system may fetch them from the disk meanwhile."""
        homes: dict[SafetensorsFile, list[str]] = {}
        for name in names:
            homes.setdefault(self._home[name], []).append(name)
        for file, inside in homes.items():
            file.announce(inside)

    def read(self, name: str) -> npt.NDArray[Any]:
        """A tensor in memory of its own."""
        with self.reading():
            return self._file(name).read(name)

    def rows(self, name: str) -> Rows:
        """A matrix of which rows are read when they are asked for."""
        found = self._file(name).rows(name)

        def read(first: int, into: npt.NDArray[Any]) -> None:
            with self.reading():
                found.read(first, into)

        return Rows(found.dtype, found.shape, read)

    def _file(self, name: str) -> SafetensorsFile:
        file = self._home.get(name)
        if file is None:
            raise InputError(f"[checkpoint] wanted tensor {name} in {self.path}, found none")
        return file


class Outline(Checkpoint):
    """A config.json, or any file like it, without weights: zeros where they are read."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.reading = nullcontext
        self.config = _config(self.path)
        self.files = []
        self.entries = {}
        self.dtype = np.dtype(FLOATS[_float_of(self.path, self.config)])

    def promise(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """The tensors that there would be."""
        self.entries = {
            name: (tuple(shape), self.dtype, math.prod(shape) * self.dtype.itemsize)
            for name, shape in shapes.items()
        }

    @property
    def total_bytes(self) -> int:
        return sum(size for _, _, size in self.entries.values())

    def read(self, name: str) -> npt.NDArray[Any]:
        shape, dtype, _ = self.entries[name]
        return np.broadcast_to(np.zeros((), dtype), shape)


def without_weights(source: Path) -> Path | None:
    """The config where `source` is a config or a folder with nothing but one, else None."""
    if source.is_file():
        return source
    config = source / "config.json"
    weights = (INDEX, "*.safetensors", *PICKLES)
    bare = config.is_file() and not any(next(source.glob(p), None) for p in weights)
    return config if bare else None


def _config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    quantized = config.get("quantization_config")
    if quantized is not None and not isinstance(quantized, dict):
        raise InputError(
            f"[checkpoint] wanted an object as quantization_config of {path}, got "
            f"{type(quantized).__name__}"
        )
    return config


def _float_of(path: Path, config: Mapping[str, Any]) -> str:
    """The float that a config stores its weights in, bfloat16 where it does not say."""
    inner = config.get("text_config")
    found = [
        place[key]
        for place in (config, inner if isinstance(inner, dict) else {})
        for key in ("dtype", "torch_dtype")
        if place.get(key) is not None
    ]
    name = str(found[0]).removeprefix("torch.") if found else "bfloat16"
    if name not in FLOATS:
        raise InputError(f"[checkpoint] wanted {', '.join(FLOATS)} as dtype of {path}, got {name}")
    return name


def fetch(get: Callable[[str], Any], layout: Layout) -> dict[str, Any]:
    """The tensors of `layout`, arrays or Rows; InputError where one has another dtype or shape."""
    tensors: dict[str, Any] = {}
    for name, (dtype, shape) in layout.items():
        tensors[name] = array = get(name)
        if array.dtype != dtype or array.shape != shape:
            raise InputError(
                f"[checkpoint] wanted tensor {name} as {dtype} {shape}, got {array.dtype} "
                f"{array.shape}"
            )
    return tensors


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    good = isinstance(weight_map, dict) and all(
        isinstance(shard, str) and Path(shard).name == shard for shard in weight_map.values()
    )
    if not good:
        raise InputError(f"[checkpoint] wanted a weight_map of file names in {folder / INDEX}")
    return dict(weight_map or {})


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        files = [folder / shard for shard in sorted(set(_weight_map(folder).values()))]
        for file in files:
            if not file.is_file():
                raise InputError(
                    f"[checkpoint] {INDEX} of {folder} names {file.name}, which is missing"
                )
        return files
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise InputError(
            f"[checkpoint] {folder} has only pickled weights ({pickles[0]}), which can run "
            "code when "
            'they are read; convert them where you trust them: python -c "from transformers import '
            f"AutoModelForCausalLM as M; M.from_pretrained('{folder}').save_pretrained('OUT')\""
        )
    raise InputError(f"[checkpoint] wanted {SINGLE} or {INDEX} in {folder}, found neither")


def _shards(layout: Layout, largest: int) -> Iterator[dict[str, Any]]:
    shard: dict[str, Any] = {}
    size = 0
    for name, (dtype, shape) in layout.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if shard and size + nbytes > largest:
            yield shard
            shard, size = {}, 0
        shard[name] = (dtype, shape)
        size += nbytes
    yield shard


def write_checkpoint(
    folder: Path,
    layout: Layout,
    produce: Callable[[str], npt.NDArray[Any]],
    max_shard_size: int,
) -> None:
    """Writes the tensors of `layout`, one in memory at a time, in files of at most that many bytes
    (a larger tensor gets a file of its own), with an index where there are several."""
    shards = list(_shards(layout, max_shard_size))
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        safetensors.write(folder / name, shard, produce, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
    if len(shards) > 1:
        total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        safetensors.write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def copy_side_files(source: Path, destination: Path) -> None:
    """Copies tokenizer, chat template, generation config and licence; never weights or code."""
    for pattern in SIDE_FILES:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and path.suffix not in {".py", ".bin", ".safetensors"}:
                shutil.copyfile(path, destination / path.name)
