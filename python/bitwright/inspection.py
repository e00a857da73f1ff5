"""What is in a checkpoint, from headers, config and the order of columns: no weight read, no model
built."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitwright import archs, papers, registry
from bitwright.files.checkpoint import Checkpoint
from bitwright.formats.dense import dense
from bitwright.report import RunReport
from bitwright.spec import InputError

_NUMBER = re.compile(r"\.\d+(?=\.)")


@dataclass(frozen=True)
class Entry:
    """Tensors that differ only in their block number. scheme: of a quantized linear, else the
    dtype. error: the largest relative output error among them, None where no report tells.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    scheme: str
    bytes: int
    error: float | None = None


@dataclass(frozen=True)
class Inspection:
    """quant_method: "" for a float checkpoint. bits_per_weight: of the quantized linears, 0 if none
    are read. fused: how many decoder layers `bitwright.load` runs in one call each, or why none.
    report: the report of a folder of ours."""

    path: str
    model: str
    quant_method: str
    quantization: Mapping[str, Any]
    entries: tuple[Entry, ...]
    bytes: int
    bits_per_weight: float
    fused: str
    report: RunReport | None
    damage: str = ""  # of the report

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _tensors(checkpoint: Checkpoint) -> list[Entry]:
    return [
        Entry(name, 1, shape, str(dtype), size)
        for name, (shape, dtype, size) in checkpoint.entries.items()
    ]


def _modules(checkpoint: Checkpoint, errors: Mapping[str, float]) -> tuple[list[Entry], float]:
    """Quantized linears as one entry each, and their bits per weight; the rest as it lies there."""
    view = dense(checkpoint)
    sizes: dict[str, int] = {}
    plain = []
    for entry in _tensors(checkpoint):
        module = view.owner(entry.name)
        if module is None:
            plain.append(entry)
        elif not entry.name.endswith((".g_idx", ".weight_shape")):
            sizes[module] = sizes.get(module, 0) + entry.bytes
    linears = [
        Entry(
            module,
            1,
            view.shape(f"{module}.weight"),
            view.scheme(module).name,
            size,
            errors.get(module),
        )
        for module, size in sizes.items()
    ]
    weights = sum(one.shape[0] * one.shape[1] for one in linears)
    bits = 8 * sum(sizes.values()) / weights if weights else 0.0
    return [*linears, *plain], bits


def _condense(entries: list[Entry]) -> tuple[Entry, ...]:
    groups: dict[tuple[str, tuple[int, ...], str], list[Entry]] = {}
    for entry in entries:
        key = (_NUMBER.sub(".*", entry.name), entry.shape, entry.scheme)
        groups.setdefault(key, []).append(entry)
    return tuple(
        Entry(
            name if len(found) > 1 else found[0].name,
            len(found),
            shape,
            scheme,
            sum(one.bytes for one in found),
            max((one.error for one in found if one.error is not None), default=None),
        )
        for (name, shape, scheme), found in groups.items()
    )


def inspect(path: str | Path) -> Inspection:
    """What lies in the folder `path`, quantized by whatever tool; InputError if nothing does."""
    checkpoint = Checkpoint(Path(path))
    config = checkpoint.config.get("quantization_config") or {}
    method = str(config.get("quant_method", "unnamed")) if config else ""
    report, damage = _report(checkpoint.path)
    errors = {} if report is None else {one.name: one.error for one in report.linears}
    fused = ""
    if method in registry.readers():
        entries, bits = _modules(checkpoint, errors)
        fused = _fused(checkpoint, {one.name for one in entries})
    else:
        entries, bits = _tensors(checkpoint), 0.0
    return Inspection(
        str(path),
        str((checkpoint.config.get("architectures") or ["unnamed"])[0]),
        method,
        config,
        _condense(entries),
        checkpoint.total_bytes,
        bits,
        fused,
        report,
        damage,
    )


def _fused(checkpoint: Checkpoint, names: Collection[str]) -> str:
    """By what the config, the names and g_idx tell: a layer needs all its linears quantized, with
    their columns in natural order."""
    config, arch = checkpoint.config, archs.find(checkpoint.config)
    told = archs.not_fused(config)
    if told or arch is None:
        return f"layers run operation by operation: {told}"
    settings, tensors = config["quantization_config"], set(checkpoint.entries)

    def natural(order: str) -> bool:
        return order not in tensors or bool(np.all(np.diff(checkpoint.read(order)) >= 0))

    def ready(module: str) -> bool:
        if module not in names or module in settings.get("ordered", ()):
            return False
        return natural(f"{module}.g_idx") and natural(f"{module}.weight_g_idx")

    linears = [linear.name for group in arch.groups for linear in group.linears]
    count = int(config.get("num_hidden_layers", 0))
    whole = sum(all(ready(f"{arch.blocks}.{i}.{name}") for name in linears) for i in range(count))
    missing = "" if whole == count else "; the others have linears in float or in act-order"
    if whole:
        missing += (
            "; those fall back where gradients, hooks, output_attentions, eager attention, "
            "torch.compile or a cache of another kind ask for the plain layer"
        )
    return f"{whole} of {count} layers run in one call each{missing}"


def _report(folder: Path) -> tuple[RunReport | None, str]:
    """The report of a folder of ours, and what is wrong with it."""
    try:
        return papers.read(folder), ""
    except InputError as error:
        return None, str(error)
