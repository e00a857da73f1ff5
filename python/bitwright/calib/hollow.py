"""Building a transformers model without its weights.

From config.json alone, on the meta device; no code of a checkpoint is executed
(`trust_remote_code` is False and stays so). Buffers that no checkpoint carries (rotary
frequencies, Gemma's embedding scale) are made real by the model's own initialiser, as
`from_pretrained` does; a sentinel tells if it missed one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from bitwright.calib import attention as door
from bitwright.spec import InputError, RefusedError

MOST = 0.5  # share of the blocks' weights

_FROM_CONFIG: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config


class Slot(NamedTuple):
    """Where one tensor of the model lives, and its meta twin."""

    table: dict[str, Any]
    key: str
    meta: torch.Tensor


def read_config(folder: Path | PreTrainedConfig) -> PreTrainedConfig:
    """The config without its quantization: the model built from it is a float one."""
    if isinstance(folder, PreTrainedConfig):
        config = deepcopy(folder)
    else:
        try:
            config = AutoConfig.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:
            want = f"a config.json in {folder} that transformers knows"
            raise InputError(_told(want, error)) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def build(config: PreTrainedConfig, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    """The causal language model on the meta device, in eval mode, with real buffers.

    Models that do not ask the attention interface run their own eager attention."""
    try:
        with torch.device("meta"):
            model = _FROM_CONFIG(
                config, trust_remote_code=False, dtype=dtype, attn_implementation=attention
            )
    except Exception as error:
        want = "a config.json of a causal language model that transformers can build"
        raise InputError(_told(want, error)) from error
    if attention == door.NAME and not model._can_set_attn_implementation():
        return build(config, dtype, "eager")
    make_buffers_real(model)
    model.train(False)
    return model


def _told(wanted: str, error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    return f"[skeleton] wanted {wanted}, got {type(error).__name__}: {line}"


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder layers: the longest list that holds nothing else."""
    unsplit = set(getattr(model, "_no_split_modules", None) or ())

    def is_layer(module: nn.Module) -> bool:
        return isinstance(module, GradientCheckpointingLayer) or type(module).__name__ in unsplit

    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(map(is_layer, module))
    ]
    if not found:
        raise RefusedError(
            "[skeleton] wanted a model with a list of decoder layers, found none in "
            f"{type(model).__name__}"
        )
    path, blocks = max(found, key=lambda pair: len(pair[1]))
    _require_matrices(model, path, blocks)
    return path, blocks


def _require_matrices(model: PreTrainedModel, path: str, blocks: nn.ModuleList) -> None:
    """RefusedError where stacks of matrices, the experts of a mixture, hold most of a block: with
    them in float a result would be small in name only, and readers expect them quantized."""
    sizes = dict(blocks.named_parameters())
    stacked = {name: p.numel() for name, p in sizes.items() if p.ndim > 2}
    if sum(stacked.values()) > MOST * sum(p.numel() for p in sizes.values()):
        largest = max(stacked, key=lambda name: stacked[name])
        raise RefusedError(
            f"[skeleton] wanted blocks made of linears, got {type(model).__name__} with most of "
            f"its weights in {path}.{largest} of shape {tuple(sizes[largest].shape)}; mixtures of "
            "experts are not supported yet"
        )


def find_slots(model: PreTrainedModel) -> dict[str, Slot]:
    """Every parameter and persistent buffer by its name; tied ones under each of theirs."""
    slots = {}
    for path, module in model.named_modules():
        own = module._non_persistent_buffers_set
        entries = [(module._parameters, key) for key in module._parameters]
        entries += [(module._buffers, key) for key in module._buffers if key not in own]
        for table, key in entries:
            value = table[key]
            if value is not None:
                slots[f"{path}.{key}" if path else key] = Slot(table, key, value)
    return slots


def find_sources(
    model: PreTrainedModel, slots: Mapping[str, Slot], names: Iterable[str]
) -> dict[str, str]:
    """Name in the model -> in the checkpoint: its own, without the base model's prefix, or tied."""
    have = names if isinstance(names, Mapping) else dict.fromkeys(names)
    prefix = f"{model.base_model_prefix}."
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    sources = {}
    for name, slot in slots.items():
        spellings = [s for n in (name, tied.get(name, name)) for s in (n, n.removeprefix(prefix))]
        source = next((s for s in spellings if s in have), None)
        if source is None:
            raise InputError(
                f"[skeleton] wanted tensor {name} of shape {tuple(slot.meta.shape)} as the config "
                "asks, got a checkpoint without it"
            )
        known = have[source]
        check_shape(source, slot.meta.shape, getattr(known, "shape", known))
        sources[name] = source
    return sources


def own_names(model: PreTrainedModel, slots: Mapping[str, Slot]) -> list[str]:
    """The tensors that a checkpoint of the model holds: tied ones once."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return [name for name in slots if tied.get(name, name) == name]


def check_shape(name: str, want: Sequence[int], got: Sequence[int] | None) -> None:
    """InputError unless both shapes agree; a shape that is not known yet (None) passes."""
    if got is not None and tuple(got) != tuple(want):
        raise InputError(
            f"[skeleton] wanted {name} of shape {tuple(want)} as the config asks, got {tuple(got)}"
        )


def make_buffers_real(model: PreTrainedModel) -> None:
    """Compute the buffers that no checkpoint carries."""
    initialise: Callable[[nn.Module], None] = model._init_weights
    for path, module in model.named_modules():
        own = {n: module._buffers[n] for n in sorted(module._non_persistent_buffers_set)}
        metas = {n: buffer for n, buffer in own.items() if buffer is not None}
        for name, meta in metas.items():
            module._buffers[name] = torch.full_like(meta, _sentinel(meta.dtype), device="cpu")
        if metas:
            with torch.no_grad():
                initialise(module)
        for name in metas:
            if _missed(module._buffers[name]):
                raise RefusedError(
                    f"[skeleton] wanted buffers that {type(model).__name__} computes from its "
                    f"config, got nothing for {path}.{name}"
                )


def move_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Put the buffers that no checkpoint carries on a device."""
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            module._buffers[name] = None if buffer is None else buffer.to(device)


def _sentinel(dtype: torch.dtype) -> float:
    if dtype.is_floating_point:
        return float("nan")
    return 0 if dtype is torch.bool else torch.iinfo(dtype).min


def _missed(buffer: torch.Tensor | None) -> bool:
    if buffer is None or buffer.dtype is torch.bool:
        return False
    floating = buffer.is_floating_point()
    return bool((buffer.isnan() if floating else buffer == _sentinel(buffer.dtype)).any())
