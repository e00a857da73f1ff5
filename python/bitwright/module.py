"""The door: `quantize` takes a checkpoint folder, a hub id, or a model in memory.

A transformers model is quantized in place through the same road as a checkpoint on disk: saved,
quantized block by block, and its linears get the dequantized weights. Any other torch module is
handled where it stands: hooks collect the statistics of every linear but lm_head while the
calibration batches run through it once, unquantized and in eval mode; each linear is then solved on
its own, and the weights are swapped when all of them are.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from bitwright import ops, pipeline, registry
from bitwright import recipe as recipes
from bitwright.calib.memory import resident_bytes
from bitwright.calib.skeleton import ForwardDtype, as_tensor
from bitwright.calib.stats import StatsCollector
from bitwright.export import MAX_SHARD_SIZE
from bitwright.files.checkpoint import Checkpoint, copy_side_files
from bitwright.files.hub import resolve
from bitwright.formats.dense import Dense, dense
from bitwright.matrix import require_of_a_matrix
from bitwright.progress import Progress, silent
from bitwright.report import RunReport
from bitwright.spec import InputError, QTensor, Recipe, RefusedError, Report, Scheme, Stats


def quantize(
    model_or_path: Any,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    out: str | Path | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    work: str | Path | None = None,
    threads: int | None = None,
    dtype: ForwardDtype | None = None,
    device: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    memory: int | None = None,
    strict: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
    **wishes: Any,
) -> RunReport:
    """Quantizes a checkpoint (folder or hub id) into the folder `out`, or a model in place.

    recipe: a Recipe, a dict, or a YAML / JSON file. wishes: its fields as keywords, e.g.
    scheme="int4-g64", method="gptq", effort="default", format="compressed-tensors", samples=128,
    length=512.
    calibration: text or JSONL file, data set, list of strings, token ids (N, length), or the name
    of a shipped text, "mixed" (None) or "books"; for a module that is no transformers model an
    iterable of its inputs.
    tokenizer: for a model in memory that was not loaded from a folder with one. work: folder for
    what is finished (default OUT.work, removed at the end). threads: of the C++ core. device: of
    the forward and the Gram sums, "cpu" or "cuda" (None: a GPU where torch has one; other modules
    run where they stand). memory: bytes that the run may take; where parked activations do not fit
    into them, or into what a GPU has free, blocks run again for each group.
    max_shard_size: bytes. strict: a fallback is an error. Returns the report that also lies in
    `out`. Errors: InputError, RefusedError (ValueErrors), NumericalError, VerificationError.
    """
    wish = recipes.merge(recipe, wishes)
    if isinstance(model_or_path, str | Path) and out is None:
        raise InputError("[quantize] wanted out=, a folder to write to, got none")
    keywords = {
        "calibration": calibration, "threads": threads, "dtype": dtype, "device": device,
        "memory": memory,
        "max_shard_size": max_shard_size, "strict": strict, "overwrite": overwrite,
        "progress": progress, "work": None if work is None else Path(work),
    }  # fmt: skip
    if isinstance(model_or_path, str | Path) and out is not None:
        base = str(model_or_path)
        return pipeline.quantize(resolve(base), Path(out), wish, base=base, **keywords)
    if isinstance(model_or_path, PreTrainedModel):
        return _transformers(model_or_path, tokenizer, out, wish, keywords)
    if isinstance(model_or_path, nn.Module):
        if device not in (None, "cpu"):
            raise RefusedError(
                f"[quantize] wanted a checkpoint or a transformers model for device {device!r}, "
                f"got {type(model_or_path).__name__}, which runs where it stands"
            )
        return _plain(model_or_path, wish, calibration, strict)
    raise RefusedError(
        "[quantize] wanted a checkpoint folder or a torch module, got "
        f"{type(model_or_path).__name__}"
    )


def _transformers(
    model: PreTrainedModel,
    tokenizer: Any,
    out: str | Path | None,
    recipe: Recipe,
    keywords: dict[str, Any],
) -> RunReport:
    with tempfile.TemporaryDirectory(prefix="bitwright-") as scratch:
        source = Path(scratch) / "model"
        target = Path(scratch) / "out" if out is None else Path(out)
        _save(model, tokenizer, source)
        base = str(getattr(model, "name_or_path", "") or type(model).__name__)
        report = pipeline.quantize(source, target, recipe, base=base, **keywords)
        _load_into(model, dense(Checkpoint(target)), report)
    return report


def _save(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    origin = Path(str(getattr(model, "name_or_path", "") or "."))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    elif (origin / "tokenizer_config.json").is_file():
        copy_side_files(origin, folder)


@torch.no_grad()
def _load_into(model: PreTrainedModel, view: Dense, report: RunReport) -> None:
    """Every weight of a linear, and every norm that absorbed column scales, as written."""
    changed = {linear.name for linear in report.linears}
    if report.recipe.method.startswith("awq"):
        changed |= {n for n, m in model.named_modules() if "norm" in type(m).__name__.lower()}
    written = set(view.names())
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] in changed and name in written:
            parameter.copy_(as_tensor(ops.as_numpy(view.read(name))))


_ALONE = (
    "every linear was solved on the inputs of the unquantized module, alone: no float model beside "
    "the quantized one, v on its plain Gram, rows of q and k one by one",
)


@torch.no_grad()
def _plain(module: nn.Module, recipe: Recipe, calibration: Any, strict: bool) -> RunReport:
    if recipe.method.startswith("awq"):
        raise RefusedError(
            f"[quantize] wanted a transformers model for {recipe.method}, whose norms absorb the "
            f"column scales, got {type(module).__name__}; rtn and gptq work"
        )
    require_of_a_matrix("quantize", registry.get("solvers", recipe.method), recipe.options)
    begin = time.perf_counter()
    linears = {
        name: m
        for name, m in module.named_modules()
        if isinstance(m, nn.Linear) and name.rpartition(".")[2] != "lm_head"
    }
    if not linears:
        raise InputError(f"[quantize] wanted nn.Linear in {type(module).__name__}, found none")
    schemes, unused = recipes.resolve(recipe, tuple(linears))
    wanted = {name: scheme for name, scheme in schemes.items() if scheme is not None}
    stats = {} if recipe.method == "rtn" else _observe(module, linears, wanted, calibration)
    done = {
        name: _solve(name, linears[name], scheme, stats.get(name), recipe)
        for name, scheme in wanted.items()
    }
    solved = [report for _, report in done.values()]
    tokens = max((one.tokens for one in solved), default=0)
    report = RunReport(
        base=type(module).__name__,
        recipe=recipe,
        calibration=f"{tokens} rows of given inputs" if stats else "none: data-free",
        tokens=tokens,
        linears=tuple(solved),
        skipped=tuple(name for name, scheme in schemes.items() if scheme is None),
        notes=_ALONE if stats else (),
        unused_overrides=unused,
        versions={name: version(name) for name in ("bitwright", "torch", "numpy")},
        isa=ops.isa(),
        threads=ops.threads(),
        seconds={"total": time.perf_counter() - begin},
        peak_rss=resident_bytes(peak=True),
    )
    if strict:
        report.raise_if_strict()
    for name, (q, _) in done.items():
        linears[name].weight.copy_(as_tensor(ops.decode(q)))
    return report


def _observe(
    module: nn.Module,
    linears: Mapping[str, nn.Linear],
    wanted: Mapping[str, Scheme],
    calibration: Any,
) -> dict[str, Stats]:
    if not isinstance(calibration, Iterable) or isinstance(calibration, str | bytes):
        raise InputError(
            "[quantize] wanted calibration=, an iterable of inputs of "
            f"{type(module).__name__}, got "
            f"{type(calibration).__name__}; method rtn needs none"
        )
    collectors = {name: StatsCollector(linears[name].in_features) for name in wanted}

    def hook(
        collector: StatsCollector, _module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        collector.update((args[0] if args else named["input"]).detach().cpu())

    handles = [
        linears[name].register_forward_pre_hook(partial(hook, collector), with_kwargs=True)
        for name, collector in collectors.items()
    ]
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        for batch in calibration:
            if isinstance(batch, Mapping):
                module(**batch)
            else:
                module(*batch) if isinstance(batch, list | tuple) else module(batch)
    finally:
        for handle in handles:
            handle.remove()
        for one in training:
            one.training = True
    return {name: _finish(name, collector) for name, collector in collectors.items()}


def _finish(name: str, collector: StatsCollector) -> Stats:
    try:
        return collector.finish()
    except InputError as error:
        raise InputError(f"{error}, at the input of {name}") from error


def _solve(
    name: str, linear: nn.Linear, scheme: Scheme, stats: Stats | None, recipe: Recipe
) -> tuple[QTensor, Report]:
    begin = time.perf_counter()
    W = np.ascontiguousarray(ops.as_numpy(linear.weight.detach().cpu()).astype(np.float32))
    if not np.isfinite(W).all():
        raise InputError(f"[quantize] wanted finite weights, got NaN or infinity in {name}")
    solver = registry.get("solvers", recipe.method)
    q, report = solver.solve(W, stats, scheme, **recipes.solver_options(recipe))
    return q, replace(report, name=name, seconds=round(time.perf_counter() - begin, 4))
