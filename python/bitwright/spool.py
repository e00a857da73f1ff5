"""The work folder: every finished piece goes to disk, whole, while the next one is computed.

Its bytes are handed to the system at once; a thread waits for the disk and lets the file appear,
in the order in which pieces were finished. The next is handed over when the one before is there: a
run that is killed loses at most the piece in work and the one before it.

    fingerprint.json          what the run depends on; any change is refused, naming old and new
                              value
    linears/<name>.safetensors    words, scales, zeros (steps of two-level scales, column_scales
                              where a norm absorbed them), scheme and report in the metadata
    norms/<name>.safetensors  a norm that absorbed column scales: gain, bias, scales
    notes.json                what the report will say about the capture, and in which block it was
                              found
    hidden-<i>.safetensors    inputs of block i, one tensor per batch; only the newest is kept

A file appears by rename, so it is complete or not there. Whatever is there when a run starts is
taken as it is; because each piece is a function of the fingerprint, the end is the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitwright import ops, schemes
from bitwright.files import safetensors
from bitwright.spec import F32, DiskError, InputError, QTensor, Report, Scheme


@dataclass(frozen=True, eq=False)
class Finished:
    """A finished linear: its QTensor, its Report and the column scales that a norm absorbed."""

    q: QTensor
    report: Report
    column_scales: F32 | None = None

    def dense(self) -> F32:
        """The weights that the linear has from now on, on inputs that the norm has not rescaled."""
        W = ops.decode(self.q)
        return W if self.column_scales is None else W / self.column_scales


class Spool:
    """Reads and writes a work folder. As a context manager it ends with everything on disk; what
    could not be written raises DiskError at the next piece, at a look at one, or at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer = ThreadPoolExecutor(1, "bitwright-spool")
        self._written: Future[None] | None = None
        self._name = ""

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._writer.shutdown()
        if kind is None:
            self.settle()

    def settle(self) -> None:
        """Waits until all that was finished is on disk."""
        before, self._written, self._name = self._written, None, ""
        if before is not None:
            before.result()

    def _finish(
        self,
        path: Path,
        arrays: Mapping[str, npt.NDArray[Any]],
        metadata: Mapping[str, str],
        name: str = "",
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Hands a piece over, once the one before is on disk."""
        self.settle()
        appear = safetensors.stage(path, arrays, metadata)

        def finish() -> None:
            appear()
            then()

        self._written, self._name = self._writer.submit(finish), name

    def start(self, fingerprint: Mapping[str, str]) -> None:
        """Makes the folder, or checks that it was made for the same run; InputError if not."""
        try:
            self._start(fingerprint)
        except OSError as error:
            raise DiskError(
                f"[work] could not use the work folder {self.folder}: {error.strerror or error}"
            ) from error

    def _start(self, fingerprint: Mapping[str, str]) -> None:
        path = self.folder / "fingerprint.json"
        if path.exists():
            try:
                known = json.loads(path.read_text())
            except ValueError as error:
                raise InputError(f"[work] {path} is damaged; delete {self.folder}") from error
            self._compare(known, fingerprint)
        elif self.folder.exists() and any(p.suffix != ".part" for p in self.folder.iterdir()):
            raise InputError(
                f"[work] wanted an empty work folder or one of ours, got {self.folder} with other "
                "files"
            )
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            safetensors.write_text(path, json.dumps(dict(fingerprint), indent=1))
        for part in ("linears", "norms"):
            (self.folder / part).mkdir(exist_ok=True)

    def _compare(self, old: Mapping[str, str], new: Mapping[str, str]) -> None:
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                raise InputError(
                    f"[work] {self.folder} belongs to a run with {key} = {old.get(key)}, this "
                    f"one has {key} = {new.get(key)}; use the old value, another --work folder, "
                    "or delete this one"
                )

    def _linear(self, name: str) -> Path:
        return self.folder / "linears" / f"{name}.safetensors"

    def save(self, name: str, done: Finished) -> None:
        q = done.q
        arrays: dict[str, npt.NDArray[Any]] = {
            "words": ops.pack(q.codes, q.scheme.bits),
            "scales": q.scales,
            "zeros": q.zeros,
        }
        if q.steps is not None:
            arrays["steps"] = q.steps
        if done.column_scales is not None:
            arrays["column_scales"] = done.column_scales
        scheme = {"name": q.scheme.name, "scale": q.scheme.scale, "zero_min": q.scheme.zero_min}
        scheme["global_scale"] = q.global_scale
        metadata = {
            "scheme": json.dumps(scheme),
            "columns": str(q.shape[1]),
            "report": json.dumps(done.report.to_dict()),
        }
        self._finish(self._linear(name), arrays, metadata, name)

    def load(self, name: str) -> Finished | None:
        """The finished linear of that name, None if there is none yet."""
        self.settle()
        path = self._linear(name)
        if not path.exists():
            return None
        file = safetensors.SafetensorsFile(path)
        stored = json.loads(file.metadata["scheme"])
        scheme: Scheme = replace(
            schemes.parse(stored["name"]), scale=stored["scale"], zero_min=stored["zero_min"]
        )
        codes = ops.unpack(file.read("words"), scheme.bits, int(file.metadata["columns"]))
        whole = float(stored["global_scale"])
        steps, columns = (
            file.read(name) if name in file.entries else None for name in ("steps", "column_scales")
        )
        q = QTensor(codes, file.read("scales"), file.read("zeros"), scheme, whole, steps)
        return Finished(q, self.report(name), columns)

    def report(self, name: str) -> Report:
        """The report alone, without reading the codes."""
        self.settle()
        fields = json.loads(safetensors.SafetensorsFile(self._linear(name)).metadata["report"])
        fields.update(shape=tuple(fields["shape"]), notes=tuple(fields["notes"]))
        return Report(**fields)

    def has(self, name: str) -> bool:
        return name == self._name or self._linear(name).exists()

    def save_norm(self, name: str, arrays: Mapping[str, npt.NDArray[Any]], exponent: float) -> None:
        path = self.folder / "norms" / f"{name}.safetensors"
        self._finish(path, arrays, {"exponent": repr(exponent)})

    def norm(self, name: str) -> tuple[dict[str, npt.NDArray[Any]], float] | None:
        """Gain, scales and maybe bias of a rescaled norm, and the exponent; None if plain."""
        self.settle()
        path = self.folder / "norms" / f"{name}.safetensors"
        if not path.exists():
            return None
        file = safetensors.SafetensorsFile(path)
        return {key: file.read(key) for key in file.entries}, float(file.metadata["exponent"])

    def save_notes(self, told: Mapping[str, int]) -> None:
        """Notes and their blocks; before anything that was made under them."""
        if told and dict(told) != self.notes():
            safetensors.write_text(self.folder / "notes.json", json.dumps(dict(told), indent=1))

    def notes(self) -> dict[str, int]:
        path = self.folder / "notes.json"
        told: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}
        return told

    def save_hidden(self, block: int, batches: Sequence[npt.NDArray[Any]]) -> None:
        """The inputs of block `block`; those of earlier blocks are dropped once these are there."""
        arrays = {f"{i:05d}": batch for i, batch in enumerate(batches)}
        path = self.folder / f"hidden-{block:05d}.safetensors"
        self._finish(path, arrays, {}, then=self._drop_older)

    def _drop_older(self) -> None:
        for path in self._hidden()[:-1]:
            path.unlink()

    def _hidden(self) -> list[Path]:
        return sorted(self.folder.glob("hidden-?????.safetensors"))

    def hidden(self) -> tuple[int, list[npt.NDArray[Any]]] | None:
        """The newest saved block index and its inputs, None if there are none."""
        self.settle()
        found = self._hidden()
        if not found:
            return None
        file = safetensors.SafetensorsFile(found[-1])
        return int(found[-1].stem.removeprefix("hidden-")), [
            file.read(k) for k in sorted(file.entries)
        ]

    def bytes(self) -> int:
        """What the folder takes on disk."""
        self.settle()
        return sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file())


def asarrays(batches: Sequence[Any]) -> list[npt.NDArray[Any]]:
    return [np.ascontiguousarray(ops.as_numpy(batch)) for batch in batches]
