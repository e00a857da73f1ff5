"""What a run is about: checkpoint, architecture, and what is to become of each matrix. Nothing runs
here.

Opening a job refuses everything that can be refused without reading a weight: an unusable folder, a
model that is already quantized, shapes that contradict the config, schemes that the format cannot
hold.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from bitwright import archs, ops, registry
from bitwright import recipe as recipes
from bitwright.calib import device as devices
from bitwright.calib.discover import discover
from bitwright.calib.heads import heads_of
from bitwright.calib.skeleton import ForwardDtype, Skeleton, forward_dtype, longest_window
from bitwright.calib.sums import CoreSums, Sums
from bitwright.files.checkpoint import Checkpoint, Outline
from bitwright.spec import F32, Arch, Group, Heads, InputError, Linear, Recipe, RefusedError, Target

COMPARED_TOKENS = 32768  # at 2 bits, KL with 8192 instead of 16384: .83 against .76
TOKENS_PER_BATCH = 4096  # of one forward call: activations of a block stay in the megabytes


@dataclass(frozen=True, eq=False)
class Job:
    """An opened run. targets: one per linear of every block, in the order they are solved, by name.

    unused: override patterns that matched nothing. unreached: matrices of the blocks that are no
    linear. batch: windows per forward call."""

    checkpoint: Checkpoint
    recipe: Recipe
    skeleton: Skeleton
    arch: Arch
    targets: Mapping[str, Target]
    unused: tuple[str, ...]
    unreached: tuple[str, ...]
    dtype: ForwardDtype
    threads: int
    batch: int

    @property
    def compare(self) -> int:
        """The float model runs alongside so many of the batches, evenly spread."""
        options = recipes.solver_options(self.recipe)
        wanted = options.get("alpha") or options.get("residual")
        every = float(options.get("compare", 0)) if wanted else 0.0
        batches = -(-self.recipe.samples // self.batch)
        least = -(-COMPARED_TOKENS // (self.batch * self.recipe.length))
        return min(batches, max(math.ceil(batches / every), least)) if every > 0 else 0

    @property
    def hold(self) -> bool:
        """Whether the share of the drift is to be chosen on tokens that are counted apart."""
        return recipes.solver_options(self.recipe).get("alpha") == "auto"

    @property
    def sums(self) -> bool:
        """Whether linears whose outputs are added to the residual stream make up for its error."""
        return recipes.solver_options(self.recipe).get("residual") != 0 and self.compare > 0

    @property
    def mix(self) -> int:
        """Every so manieth query forms the attention-mixed inputs of v, 0: none does."""
        return int(recipes.solver_options(self.recipe).get("attention", 0))

    @property
    def device(self) -> devices.Device:
        """Where the forward and the sums run."""
        return self.skeleton.device

    @property
    def gram_dtype(self) -> str:
        """What bf16 inputs are multiplied in; InputError for a wish that the forward or the machine
        does not allow."""
        wish = recipes.solver_options(self.recipe).get("gram_dtype", "auto")
        if self.device.type != "cpu" and wish in ("auto", self.dtype):
            return self.dtype
        dtype = ops.BFLOAT16 if self.dtype == "bfloat16" else np.dtype(np.float32)
        return ops.products_of(dtype, None if wish == "auto" else wish)

    def heads(self, block: int) -> Heads | None:
        """The heads of a block, where rows of q and k can be solved together."""
        found = heads_of(self.skeleton, block, self.arch, self.recipe.length)
        return found if isinstance(found, Heads) else None

    def sums_of(self, k: int) -> Sums:
        """Who adds up what arrives at a linear of k columns."""
        if self.device.type == "cpu":
            return CoreSums(k, self.gram_dtype)
        return devices.DeviceSums(k, self.device, self.gram_dtype == "bfloat16")

    @property
    def format(self) -> ModuleType:
        return registry.get("formats", self.recipe.format)

    def name(self, block: int, linear: Linear) -> str:
        return f"{self.skeleton.path(block)}.{linear.name}"

    def target(self, block: int, linear: Linear) -> Target:
        return self.targets[self.name(block, linear)]

    def wanted(self, block: int, group: Group) -> list[Target]:
        """The targets of a group that are to be quantized."""
        found = [self.target(block, linear) for linear in group.linears]
        return [target for target in found if target.scheme is not None]

    def read(self, module: str, part: str = "weight") -> npt.NDArray[Any]:
        """A tensor of the checkpoint by its name in the model."""
        return self.checkpoint.read(self.skeleton.sources[f"{module}.{part}"])

    def notes(self) -> tuple[str, ...]:
        """What a user must know: of the format's readers, and of what stays in float."""
        kept = [f"kept in float, no linear: {name}" for name in self.unreached]
        if self.recipe.method != "rtn" and recipes.solver_options(self.recipe).get("coupled"):
            why = heads_of(self.skeleton, 0, self.arch, self.recipe.length)
            if isinstance(why, str):
                kept.append(f"rows of q and k are solved one by one: {why}")
        if self.sums and not any(group.stream for group in self.arch.groups):
            kept.append(
                "the error of the residual stream is not made up for: no linear's outputs are "
                "known to be added to it as they are"
            )
        return (*kept, *self.format.notes(tuple(self.targets.values())))

    def weight(self, target: Target) -> F32:
        """The float32 weights (n, k) of a target; InputError if one is not finite."""
        stored = self.read(target.name)
        W = np.ascontiguousarray(
            (stored.T if target.linear.transposed else stored).astype(np.float32)
        )
        if not np.isfinite(W).all():
            raise InputError(
                f"[job] wanted finite weights, got NaN or infinity in {target.name}.weight"
            )
        return W


def arch_of(config: Mapping[str, Any], skeleton: Skeleton) -> Arch:
    """The declared architecture of a config.json, else groups discovered by running a batch."""
    declared = archs.find(config)
    return discover(skeleton) if declared is None else declared


def linears_of(arch: Arch, skeleton: Skeleton) -> dict[str, Linear]:
    """Every linear of every block by its full name, in the order they are solved."""
    return {
        f"{skeleton.path(i)}.{linear.name}": linear
        for i in range(skeleton.count)
        for group in arch.groups
        for linear in group.linears
    }


def _targets(
    checkpoint: Checkpoint, skeleton: Skeleton, arch: Arch, recipe: Recipe
) -> tuple[dict[str, Target], tuple[str, ...]]:
    linears = linears_of(arch, skeleton)
    resolved, unused = recipes.resolve(recipe, tuple(linears))
    targets = {}
    for name, linear in linears.items():
        source = skeleton.sources.get(f"{name}.weight")
        if source is None:
            continue
        rows, columns = checkpoint.entries[source][0]
        shape = (columns, rows) if linear.transposed else (rows, columns)
        targets[name] = Target(name, linear, shape, resolved[name])
    return targets, tuple(unused)


def open_job(
    source: str | Path,
    recipe: Recipe,
    *,
    dtype: ForwardDtype | None = None,
    threads: int | None = None,
    device: str | None = None,
) -> Job:
    """Opens a run on a checkpoint folder; InputError or RefusedError where it cannot be done."""
    checkpoint = Checkpoint(Path(source))
    _require_float(checkpoint)
    shapes = {name: entry[0] for name, entry in checkpoint.entries.items()}
    place = _place(recipe, device)
    skeleton = Skeleton(
        checkpoint.path, checkpoint.read, shapes, dtype or forward_dtype(place), device=place
    )
    _require_known(checkpoint, skeleton)
    return _job(checkpoint, skeleton, recipe, threads)


def outline_job(
    config: Path,
    recipe: Recipe,
    *,
    dtype: ForwardDtype | None = None,
    threads: int | None = None,
    device: str | None = None,
) -> Job:
    """The same for a config.json alone: what a run would be on the weights that it asks for."""
    outline = Outline(config)
    _require_float(outline)
    place = _place(recipe, device)
    skeleton = Skeleton(config, outline.read, None, dtype or forward_dtype(place), device=place)
    outline.promise({s: tuple(skeleton.slots[n].meta.shape) for n, s in skeleton.sources.items()})
    return _job(outline, skeleton, recipe, threads)


def _place(recipe: Recipe, wish: str | None) -> devices.Device:
    """Where the forward runs; plain rounding has none."""
    place = devices.choose(wish)
    return devices.CPU if recipe.method == "rtn" else place


def _job(checkpoint: Checkpoint, skeleton: Skeleton, recipe: Recipe, threads: int | None) -> Job:
    arch = arch_of(checkpoint.config, skeleton)
    targets, unused = _targets(checkpoint, skeleton, arch, recipe)
    job = Job(
        checkpoint,
        recipe,
        skeleton,
        arch,
        targets,
        unused,
        _unreached(skeleton, linears_of(arch, skeleton)),
        skeleton.forward,
        ops.resolve_threads(threads),
        max(1, TOKENS_PER_BATCH // recipe.length),
    )
    _require_windows_fit(job)
    _require_awq_fits(job)
    if recipe.method != "rtn":
        _ = job.gram_dtype
    if not any(target.scheme for target in targets.values()):
        raise RefusedError("[job] wanted at least one linear to quantize, the overrides skip all")
    reason = job.format.refuse(tuple(targets.values()), arch)
    if reason:
        raise RefusedError(reason)
    return job


def _require_float(checkpoint: Checkpoint) -> None:
    if checkpoint.config.get("quantization_config"):
        method = checkpoint.config["quantization_config"].get("quant_method", "an unnamed method")
        raise InputError(
            f"[job] wanted a float checkpoint, got {checkpoint.path}, which is already quantized "
            f"({method})"
        )


def _require_awq_fits(job: Job) -> None:
    if not job.recipe.method.startswith("awq"):
        return
    if not any(group.norm for group in job.arch.groups):
        raise RefusedError(
            f"[awq] {job.arch.name} has no known norm in front of its linears that could absorb "
            "column scales; rtn and gptq work"
        )
    for target in job.targets.values():
        if target.scheme is not None and not target.scheme.plain:
            raise RefusedError(
                f"[awq] {target.name}: {target.scheme.name} is no plain integer scheme, AWQ's "
                "searches want one; rtn and gptq work"
            )


def _require_known(checkpoint: Checkpoint, skeleton: Skeleton) -> None:
    """InputError for a tensor of a block that the config does not count."""
    model = skeleton.model
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    short = skeleton.block_path.removeprefix(f"{model.base_model_prefix}.")
    place = re.compile(rf"(?:{re.escape(skeleton.block_path)}|{re.escape(short)})\.(\d+)\.")
    for name in checkpoint.entries:
        match = place.match(name)
        beyond = match is not None and int(match[1]) >= skeleton.count
        if beyond and not any(re.search(pattern, name) for pattern in ignored):
            raise InputError(
                f"[job] wanted {skeleton.count} blocks as the config says, got the tensor {name}"
            )


def _require_windows_fit(job: Job) -> None:
    longest = longest_window(job.skeleton)
    if job.recipe.method != "rtn" and longest and job.recipe.length > longest:
        raise InputError(
            f"[job] wanted windows of at most {longest} tokens, what the model takes, got "
            f"{job.recipe.length}"
        )


def _unreached(skeleton: Skeleton, linears: Mapping[str, Linear]) -> tuple[str, ...]:
    """Matrices of the blocks that are no linear and stay in float, block numbers as *."""
    inside = [name for i in range(skeleton.count) for name in skeleton.under(skeleton.path(i))]
    left = [
        name
        for name in inside
        if skeleton.slots[name].meta.ndim > 1 and name.removesuffix(".weight") not in linears
    ]
    path = re.compile(rf"({re.escape(skeleton.block_path)})\.\d+\.")
    return tuple(dict.fromkeys(path.sub(r"\1.*.", name) for name in left))
