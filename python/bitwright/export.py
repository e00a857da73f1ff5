"""Writes a finished result as a checkpoint, reads it back through the format's formula, compares.

The folder is built beside its destination and renamed when everything in it has been verified: it
appears complete or not at all. A tensor that nobody quantized is copied as it is, byte for byte.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bitwright import ops
from bitwright.files import safetensors
from bitwright.files.checkpoint import Checkpoint, copy_side_files, write_checkpoint
from bitwright.progress import Progress
from bitwright.spec import (
    DiskError,
    InputError,
    QTensor,
    RefusedError,
    Target,
    VerificationError,
)

REPORT = "bitwright-report.json"
PIECE = 1 << 22  # bytes compared at a time
MAX_SHARD_SIZE = 5 * 10**9  # bytes, as the hub's tools write them


class Source(Protocol):
    """Where plain tensors and the config come from: a checkpoint, or a view of one."""

    @property
    def path(self) -> Path: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def entries(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any], int]]: ...
    def read(self, name: str) -> npt.NDArray[Any]: ...


@dataclass(frozen=True, eq=False)
class Result:
    """What there is to write. names: source tensor -> name to write it under; quantized:
    QTensor of a target by name; overrides: tensors that replace the checkpoint's (rescaled
    norms).
    """

    checkpoint: Source
    names: Mapping[str, str]
    targets: Mapping[str, Target]
    quantized: Callable[[str], QTensor]
    overrides: Mapping[str, npt.NDArray[Any]]


def check_destination(out: Path, overwrite: bool) -> None:
    """InputError unless `out` is free, empty, or a result of ours that may be overwritten."""
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir():
        raise InputError(f"[out] wanted a folder to write to, got {out} below the file {above}")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir() or not (out / REPORT).exists():
        raise InputError(f"[out] wanted a new or empty folder, got {out}, which is not ours")
    if not overwrite:
        raise InputError(f"[out] {out} is a finished result; --overwrite replaces it")


def names_to_write(tensors: Iterable[str], sources: Mapping[str, str]) -> dict[str, str]:
    """Tensor of a checkpoint -> its name in the written one: the model's own spelling.

    sources: name in the model -> tensor."""
    spelled: dict[str, str] = {}
    for name, source in sources.items():
        if name == source or source not in spelled:
            spelled[source] = name
    return {tensor: spelled.get(tensor, tensor) for tensor in tensors}


class _Writer:
    """Tensors of the new checkpoint by name, each produced when it is asked for."""

    def __init__(self, result: Result, fmt: ModuleType) -> None:
        self.result, self.format = result, fmt
        self.layout: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        self._owner: dict[str, str] = {}
        self._parts: tuple[str, dict[str, npt.NDArray[Any]]] = ("", {})
        self._dtype: dict[str, np.dtype[Any]] = {}
        for source, name in result.names.items():
            self._place(source, name)

    def _place(self, source: str, name: str) -> None:
        shape, dtype, _ = self.result.checkpoint.entries[source]
        module = name.removesuffix(".weight")
        target = self.result.targets.get(module)
        if target is None or target.scheme is None or not name.endswith(".weight"):
            self.layout[name] = (np.dtype(dtype), tuple(shape))
            self._owner[name] = source
            return
        self._dtype[module] = np.dtype(dtype)
        parts = self.format.layout(module, target.shape, target.scheme, np.dtype(dtype))
        self.layout.update(parts)
        self._owner.update(dict.fromkeys(parts, f"\0{module}"))

    def produce(self, name: str) -> npt.NDArray[Any]:
        owner = self._owner[name]
        if not owner.startswith("\0"):
            return self.plain(name)
        module = owner[1:]
        if self._parts[0] != module:
            q = self.result.quantized(module)
            if q.order is not None:
                raise RefusedError(
                    f"[write] {module} has its columns in act-order, which is not written anew; "
                    "bitwright.load reads it, and save_pretrained of what that returns keeps it"
                )
            self._parts = (module, self.format.write(module, q, self._dtype[module]))
        return self._parts[1][name]

    def plain(self, name: str) -> npt.NDArray[Any]:
        override = self.result.overrides.get(name)
        array = self.result.checkpoint.read(self._owner[name]) if override is None else override
        if not _finite(array):
            raise InputError(
                f"[write] wanted finite weights, got NaN or infinity in {self._owner[name]}"
            )
        return array

    def plain_names(self) -> list[str]:
        return [name for name, owner in self._owner.items() if not owner.startswith("\0")]


def _bytes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    flat: npt.NDArray[np.uint8] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return flat


def _finite(array: npt.NDArray[Any]) -> bool:
    """Whether no float of a tensor is NaN or infinite, piece by piece; integers are."""
    flat = array.reshape(-1)
    if flat.dtype.kind not in "fV" or flat.dtype.itemsize < 2:
        return True
    return all(np.isfinite(flat[i : i + PIECE]).all() for i in range(0, flat.size, PIECE))


def _same(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    """Equal byte for byte, compared piece by piece: a comparison makes an array of its own."""
    x, y = _bytes(a), _bytes(b)
    return x.size == y.size and all(
        np.array_equal(x[i : i + PIECE], y[i : i + PIECE]) for i in range(0, x.size, PIECE)
    )


def _verify(folder: Path, writer: _Writer, config: dict[str, Any], progress: Progress) -> None:
    """Reads everything back: QTensors through the format's own reader, the rest byte for byte."""
    written, result = Checkpoint(folder), writer.result
    modules = [t.name for t in result.targets.values() if t.scheme is not None]
    progress.start(len(modules), "verify")
    for module in modules:
        want, got = result.quantized(module), writer.format.read(module, written.read, config)
        if not np.array_equal(ops.decode(want), ops.decode(got)):
            raise VerificationError(
                f"[verify] {module} does not read back from "
                f"{writer.format.__name__.split('.')[-1]} "
                f"as the weights that were meant"
            )
        progress.advance()
    for name in writer.plain_names():
        if not _same(written.read(name), writer.plain(name)):
            raise VerificationError(f"[verify] tensor {name} does not read back as it was written")


def _fill(folder: Path, writer: _Writer, version: str, shard: int, progress: Progress) -> None:
    result = writer.result
    progress.start(len(writer.layout), "write")

    def produce(name: str) -> npt.NDArray[Any]:
        progress.advance()
        return writer.produce(name)

    write_checkpoint(folder, writer.layout, produce, shard)
    quantization = writer.format.config(tuple(result.targets.values()), version)
    config = {k: v for k, v in result.checkpoint.config.items() if k != "quantization_config"}
    config["quantization_config"] = quantization
    write_json(folder / "config.json", config)
    for name, content in writer.format.side_files(quantization).items():
        write_json(folder / name, content)
    copy_side_files(result.checkpoint.path, folder)
    _verify(folder, writer, quantization, progress)


def write_json(path: Path, content: Any) -> None:
    """A JSON file, whole or not at all."""
    safetensors.write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def export(
    result: Result,
    fmt: ModuleType,
    out: Path,
    *,
    version: str,
    max_shard_size: int,
    progress: Progress,
    finish: Callable[[Path], None],
) -> None:
    """Writes `result` in format module `fmt` to folder `out`; `finish(folder)` adds report and
    card.

    VerificationError when it does not read back as meant; InputError when the disk is full. Either
    way nothing is left at `out`."""
    writer = _Writer(result, fmt)
    building = out.with_name(f"{out.name}.part")
    shutil.rmtree(building, ignore_errors=True)
    try:
        building.mkdir(parents=True)
        _fill(building, writer, version, max_shard_size, progress)
        finish(building)
    except OSError as error:
        shutil.rmtree(building, ignore_errors=True)
        raise DiskError(f"[write] could not write {out}: {error.strerror or error}") from error
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    _replace(building, out)


def _replace(building: Path, out: Path) -> None:
    old = out.with_name(f"{out.name}.old")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.replace(old)
    building.replace(out)
    shutil.rmtree(old, ignore_errors=True)
