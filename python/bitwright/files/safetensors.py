"""The safetensors container: an 8-byte little-endian header length, a JSON header, the data.

    {"__metadata__": {text: text}, name: {"dtype": "BF16", "shape": [n, k], "data_offsets": [a, b]}}

Offsets count from the end of the header. A file is accepted only if the header is a JSON object
without repeated keys, every extent has exactly the bytes of its shape, and the extents tile the
data without holes or overlaps up to the end of the file. Tensors are read by pread into memory of
their own, so that nothing stays mapped; files are written beside their destination, synced and
renamed.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import numpy.typing as npt

from bitwright.spec import DiskError, InputError

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 100 << 20
ALIGNMENT = 8  # of the data's start; the header is padded with spaces

Layout = Mapping[str, tuple["np.dtype[Any]", tuple[int, ...]]]


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: bytes begin .. end of the file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class Rows:
    """A matrix of which rows are read when they are asked for, by a slice, as of an array; all in
    the same memory: they hold until the next are asked for."""

    def __init__(
        self,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        read: Callable[[int, npt.NDArray[Any]], None],
    ) -> None:
        self.dtype, self.shape, self.read = dtype, shape, read
        self._memory = np.empty((0, *shape[1:]), dtype)

    def view(self, dtype: npt.DTypeLike) -> Rows:
        """The same bytes as numbers of another type of that size."""
        return Rows(np.dtype(dtype), self.shape, self.read)

    def __getitem__(self, rows: slice) -> npt.NDArray[Any]:
        first, end, _ = rows.indices(self.shape[0])
        if len(self._memory) < end - first:
            self._memory = np.empty((end - first, *self.shape[1:]), self.dtype)
        self.read(first, found := self._memory[: end - first])
        return found


class SafetensorsFile:
    """A safetensors file whose header has been checked against the file's size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                header, start = _header(path, file, size)
                self._descriptor = os.dup(file.fileno())
            weakref.finalize(self, os.close, self._descriptor)
        except OSError as error:
            raise InputError(f"[safetensors] could not open {path}: {error.strerror}") from error
        self.metadata = _metadata(path, header.pop("__metadata__", {}))
        self.entries = {name: _entry(path, name, fields, start) for name, fields in header.items()}
        _check_tiling(path, self.entries, start, size)

    def announce(self, names: Iterable[str]) -> None:
        """Tells the system that these tensors are read soon, where it can be told: it fetches them
        from the disk meanwhile."""
        if not hasattr(os, "posix_fadvise"):
            return
        for entry in (self.entries[name] for name in names):
            os.posix_fadvise(self._descriptor, entry.begin, entry.nbytes, os.POSIX_FADV_WILLNEED)

    def read(self, name: str) -> npt.NDArray[Any]:
        """The tensor of that name, in memory of its own."""
        entry = self._entry(name)
        array = np.empty(math.prod(entry.shape), entry.dtype)
        self._read(name, entry.begin, array)
        return array.reshape(entry.shape)

    def rows(self, name: str) -> Rows:
        """The matrix of that name, unread."""
        entry = self._entry(name)
        width = math.prod(entry.shape[1:]) * entry.dtype.itemsize

        def read(first: int, into: npt.NDArray[Any]) -> None:
            self._read(name, entry.begin + first * width, into.reshape(-1))

        return Rows(entry.dtype, entry.shape, read)

    def _read_at(self, begin: int, into: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [into], begin)
        with self.path.open("rb", buffering=0) as file:  # Windows
            file.seek(begin)
            return file.readinto(into) or 0

    def _entry(self, name: str) -> Entry:
        entry = self.entries.get(name)
        if entry is None:
            raise InputError(f"[safetensors] wanted tensor {name} in {self.path}, found none")
        return entry

    def _read(self, name: str, begin: int, array: npt.NDArray[Any]) -> None:
        view, done = array.view(np.uint8).data, 0
        while done < len(view):
            count = self._read_at(begin + done, view[done:])
            if not count:
                raise InputError(f"[safetensors] {self.path} ends inside tensor {name}")
            done += count


def _header(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, LARGEST_HEADER):
        raise InputError(
            f"[safetensors] wanted a header inside the {size} bytes of {path}, got one of {length}"
        )
    try:
        header = json.loads(file.read(length), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"[safetensors] the header of {path} is not valid JSON: {error}"
        ) from error
    if not isinstance(header, dict):
        raise InputError(
            f"[safetensors] wanted a JSON object as header of {path}, got {type(header).__name__}"
        )
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands there twice")
    return found


def _metadata(path: Path, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(f"[safetensors] wanted text values in __metadata__ of {path}, got others")
    return metadata


def _entry(path: Path, name: str, fields: Any, start: int) -> Entry:
    try:
        dtype, shape = DTYPES[fields["dtype"]], tuple(fields["shape"])
        begin, end = fields["data_offsets"]
        numbers = (*shape, begin, end)
        if any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"[safetensors] wanted dtype ({', '.join(DTYPES)}), shape and data_offsets of {name} "
            f"in {path}, got {fields!s:.200}"
        ) from error
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise InputError(
            f"[safetensors] wanted {math.prod(shape) * dtype.itemsize} bytes for {name} "
            f"({fields['dtype']} {list(shape)}) in {path}, got the extent {begin} .. {end}"
        )
    return Entry(dtype, shape, start + begin, start + end)


def _check_tiling(path: Path, entries: Mapping[str, Entry], start: int, size: int) -> None:
    at = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            what = (
                "overlaps what stands before it" if entry.begin < at else "leaves a hole before it"
            )
            raise InputError(f"[safetensors] tensor {name} of {path} {what}")
        at = entry.end
    if at != size:
        what = "cut short" if at > size else "followed by bytes that belong to no tensor"
        raise InputError(f"[safetensors] wanted {at} bytes in {path}, got {size}: it is {what}")


def _encode(layout: Layout, metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, (dtype, shape) in layout.items():
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % ALIGNMENT)


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file that appears at `path` complete, synced and by rename, or not at all.

    InputError when the disk does not take it (full, read-only, quota)."""
    with _part(path) as part, part.open("wb") as file:
        yield file
    _appear(path)


@contextmanager
def _part(path: Path) -> Iterator[Path]:
    """What becomes `path`; removed where that fails."""
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            said = f"[write] could not write {path}: {error.strerror or error}"
            raise DiskError(said) from error
        raise


def _appear(path: Path) -> None:
    with _part(path) as part:
        _sync(part, os.O_RDWR)
        part.replace(path)
        _sync(path.parent, os.O_RDONLY)


def _sync(path: Path, mode: int) -> None:
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(
    path: Path,
    layout: Layout,
    produce: Callable[[str], npt.NDArray[Any]],
    metadata: Mapping[str, str],
) -> None:
    """Writes the tensors of `layout` in its order; each is asked for once and held alone."""
    with atomic(path) as file:
        _fill(file, layout, produce, metadata)


def _fill(
    file: BinaryIO,
    layout: Layout,
    produce: Callable[[str], npt.NDArray[Any]],
    metadata: Mapping[str, str],
) -> None:
    header = _encode(layout, metadata)
    file.write(len(header).to_bytes(8, "little") + header)
    for name, (dtype, shape) in layout.items():
        array = np.asarray(produce(name), order="C")
        if array.dtype != dtype or array.shape != tuple(shape):
            raise InputError(
                f"[safetensors] wanted {name} as {dtype} {tuple(shape)}, "
                f"got {array.dtype} {array.shape}"
            )
        file.write(array.reshape(-1).view(np.uint8).data)


def save(path: Path, arrays: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Writes arrays that are already in memory."""
    stage(path, arrays, metadata)()


def stage(
    path: Path, arrays: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]
) -> Callable[[], None]:
    """Writes arrays beside `path` and returns what syncs them and lets them appear there: the half
    that waits for the disk and needs the arrays no more, on whatever thread."""
    layout = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    with _part(path) as part, part.open("wb") as file:
        _fill(file, layout, arrays.__getitem__, metadata)
    return partial(_appear, path)


def write_text(path: Path, text: str) -> None:
    """Writes a small text file whole or not at all."""
    with atomic(path) as file:
        file.write(text.encode())
