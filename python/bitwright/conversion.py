"""One result in another format: codes, scales and zero points move over, nothing is rounded again.

What the other format cannot hold exactly is refused, and what was written is read back and compared
with the weights that the first format means.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bitwright import export, papers, registry
from bitwright.calib.skeleton import Skeleton
from bitwright.files.checkpoint import Checkpoint
from bitwright.files.hub import resolve
from bitwright.formats import bitwright as own
from bitwright.formats.dense import Dense, dense
from bitwright.job import arch_of, linears_of
from bitwright.progress import Progress, silent
from bitwright.report import RunReport
from bitwright.spec import (
    Arch,
    InputError,
    Linear,
    QTensor,
    Recipe,
    RefusedError,
    Scheme,
    Target,
)

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


class _Source:
    """A quantized checkpoint as the writer wants to see it: entries of the float model."""

    def __init__(self, view: Dense) -> None:
        self.path, self.config, self.read = view.checkpoint.path, view.checkpoint.config, view.read
        dtype = _model_dtype(self.config)
        modules = {f"{module}.weight" for module in view.modules}
        self.entries: dict[str, tuple[tuple[int, ...], np.dtype[Any], int]] = {}
        for name in view.names():
            shape = view.shape(name)
            kind = dtype if name in modules else view.checkpoint.entries[name][1]
            self.entries[name] = (shape, kind, math.prod(shape) * kind.itemsize)


def _model_dtype(config: dict[str, Any]) -> np.dtype[Any]:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return DTYPES.get(name.removeprefix("torch."), DTYPES["float32"])


def _targets(
    view: Dense, scheme_of: Callable[[str], Scheme], linears: dict[str, Linear], arch: Arch
) -> dict[str, Target]:
    modules = set(view.modules)
    strange = modules - set(linears)
    if strange:
        raise RefusedError(
            f"[convert] wanted linears of the blocks of {arch.name}, got {sorted(strange)[0]} "
            "quantized"
        )
    targets = {}
    for name, linear in linears.items():
        rows, columns = view.shape(f"{name}.weight")
        shape = (columns, rows) if linear.transposed else (rows, columns)
        scheme = scheme_of(name) if name in modules else None
        targets[name] = Target(name, linear, shape, scheme)
    return targets


def convert(
    path: str | Path,
    out: str | Path,
    *,
    format: str,
    max_shard_size: int = export.MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: Progress = silent,
) -> RunReport:
    """Writes the quantized checkpoint at `path` (ours, or another tool's in a format that we read)
    to the folder `out` in `format`. RefusedError names the linear that the format cannot hold.
    """
    source, folder = resolve(path), Path(out)
    export.check_destination(folder, overwrite)
    if format not in registry.names("formats"):
        known = ", ".join(registry.names("formats"))
        raise RefusedError(f"[convert] wanted a format of {known}, got {format!r}")
    fmt = registry.get("formats", format)
    view = dense(Checkpoint(source))
    if not view.modules:
        raise InputError(f"[convert] wanted a quantized checkpoint, got {source} in float")
    shapes = {name: view.shape(name) for name in view.names()}
    skeleton = Skeleton(source, view.read, shapes)
    arch = arch_of(view.checkpoint.config, skeleton)
    ours = fmt is own  # holds scales of other tools, which need not lie on the scheme's grid

    def quantized(module: str) -> QTensor:
        q = view.quantized(module)
        return own.exact(module, q) if ours else q

    def scheme_of(module: str) -> Scheme:
        return quantized(module).scheme if ours else view.scheme(module)

    targets = _targets(view, scheme_of, linears_of(arch, skeleton), arch)
    reason = fmt.refuse(tuple(targets.values()), arch)
    if reason:
        raise RefusedError(reason)
    names = export.names_to_write(shapes, skeleton.sources)
    result = export.Result(_Source(view), names, targets, quantized, {})
    report = _report(view, format, fmt.notes(tuple(targets.values())))
    export.export(
        result, fmt, folder,
        version=version("bitwright"), max_shard_size=max_shard_size, progress=progress,
        finish=lambda building: papers.write(building, report, folder),
    )  # fmt: skip
    return report


def _report(view: Dense, fmt: str, notes: tuple[str, ...]) -> RunReport:
    folder = view.checkpoint.path
    known = papers.read(folder)
    if known is not None:
        recipe = replace(known.recipe, format=fmt)
        return replace(known, recipe=recipe, notes=(*known.notes, *notes))
    scheme = view.scheme(view.modules[0])
    return RunReport(
        base=str(folder),
        recipe=Recipe(scheme=scheme.name, method="as found", format=fmt),
        calibration="unknown: converted from a checkpoint without a report",
        tokens=0,
        linears=(),
        notes=notes,
        versions={"bitwright": version("bitwright")},
    )
