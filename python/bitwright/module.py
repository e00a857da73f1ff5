"""A transformers model in memory: quantized in place, through the same road as a checkpoint on disk."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from bitwright import ops, pipeline
from bitwright.calib.skeleton import as_tensor
from bitwright.files.checkpoint import Checkpoint, copy_side_files
from bitwright.formats.dense import dense
from bitwright.report import RunReport
from bitwright.spec import InputError, RefusedError


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    if not hasattr(model, "save_pretrained") or not isinstance(model, torch.nn.Module):
        raise RefusedError(
            f"[quantize] wanted a checkpoint folder or a transformers model, got {type(model).__name__}"
        )
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    origin = Path(str(getattr(model, "name_or_path", "") or "."))
    if tokenizer is None and (origin / "tokenizer_config.json").is_file():
        copy_side_files(origin, folder)


def quantize_module(
    model: Any, out: str | Path | None = None, *, tokenizer: Any = None, **keywords: Any
) -> RunReport:
    """Quantizes a transformers model in place: its linears get the dequantized weights, in its dtype.

    out: where to keep the quantized checkpoint too (None: nowhere). tokenizer: for calibration text,
    where the model was not loaded from a folder that has one. keywords: as `pipeline.quantize`.
    """
    with tempfile.TemporaryDirectory(prefix="bitwright-") as scratch:
        source, target = Path(scratch) / "model", Path(scratch) / "out" if out is None else Path(out)
        _save(model, tokenizer, source)
        report = pipeline.quantize(source, target, **keywords)
        checkpoint = Checkpoint(target)
        view = dense(checkpoint)
        modules = dict(model.named_modules())
        with torch.no_grad():
            for linear in report.linears:
                if linear.name not in modules:
                    raise InputError(f"[quantize] wanted {linear.name} in the model, found none")
                weight = modules[linear.name].weight
                weight.copy_(as_tensor(view.read(f"{linear.name}.weight")))
            _copy_norms(view, modules, report)
    return report


def _copy_norms(view: Any, modules: dict[str, Any], report: RunReport) -> None:
    """Column scales that moved into norms must reach the model as well."""
    if not report.recipe.method.startswith("awq"):
        return
    for name, module in modules.items():
        for part in ("weight", "bias"):
            parameter = getattr(module, part, None)
            if "norm" in type(module).__name__.lower() and isinstance(parameter, torch.nn.Parameter):
                parameter.copy_(as_tensor(ops.as_numpy(view.read(f"{name}.{part}"))))
