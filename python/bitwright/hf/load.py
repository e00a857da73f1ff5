"""A quantized folder as a transformers model on the CPU kernels.

The model is built empty, from config.json alone. One quantized linear is read and packed after the
other; where the format has codes along a row, without an order of columns, a megabyte of them at a
time goes from the file into the panels, so that memory holds the packed weights and the scales of
one linear. Other tensors are read in the dtype that the model runs in. Weights are those of the
format's own formula, whatever engine the folder was made for. The result saves (`save_pretrained`)
in format `bitwright`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from bitwright.calib import hollow
from bitwright.calib.skeleton import as_tensor
from bitwright.files.checkpoint import Checkpoint
from bitwright.files.hub import resolve
from bitwright.formats import bitwright as own
from bitwright.formats.dense import Dense, dense
from bitwright.hf.fused import set_fused
from bitwright.hf.linear import QuantLinear, mark_initialised
from bitwright.hf.product import Activations, Mode
from bitwright.hf.quantizer import BitwrightConfig, BitwrightQuantizer, is_linear, shape_of
from bitwright.hf.shared import share
from bitwright.spec import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    path: str | Path,
    *,
    mode: Mode = "fast",
    activations: Activations = "group",
    dtype: str | torch.dtype | None = None,
    attention: str | None = None,
    fused: bool = True,
) -> PreTrainedModel:
    """The model of a quantized folder, or hub id: formats bitwright, gptq, awq, compressed-tensors
    and bitsandbytes.

    mode: "fast" (int8 activations, a scale per token and "group" or "token") or "exact". dtype: of
    everything else; None: the checkpoint's, float32 where that is float16. attention: an
    implementation of transformers, None: its choice. fused: decoder layers run in one call where
    they can (hf.fused). InputError or RefusedError name what is
    missing, misshapen or unknown.
    """
    checkpoint = Checkpoint(resolve(path))
    if not checkpoint.config.get("quantization_config"):
        raise InputError(
            f"[load] wanted a quantized checkpoint, got {path} in float: `bitwright quantize` "
            "makes one, or round it on the fly by AutoModelForCausalLM.from_pretrained(..., "
            "quantization_config=bitwright.hf.BitwrightConfig())"
        )
    view = dense(checkpoint)
    model = hollow.build(
        hollow.read_config(checkpoint.path), _dtype(dtype, checkpoint.config), attention
    )
    hollow.find_blocks(model)  # refuses mixtures of experts
    homes = _fill_plain(model, view)
    config = BitwrightConfig(mode=mode, activations=activations, fused=fused)
    config.schemes, config.ordered = _replace(model, view, homes, config)
    _settle(model, checkpoint.path, config)
    return model


def _dtype(wanted: str | torch.dtype | None, config: Mapping[str, Any]) -> torch.dtype:
    if isinstance(wanted, torch.dtype):
        return wanted
    name = str(wanted or config.get("dtype") or config.get("torch_dtype") or "float32")
    name = name.removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"[load] wanted a dtype of {', '.join(DTYPES)}, got {name!r}")
    return torch.float32 if wanted is None and name == "float16" else DTYPES[name]


def _fill_plain(model: PreTrainedModel, view: Dense) -> dict[str, str]:
    """Reads what is not quantized; the rest: path in the model -> quantized module of the file."""
    shapes = {name: view.shape(name) for name in view.names()}
    slots, homes = hollow.find_slots(model), {f"{module}.weight": module for module in view.modules}
    sources, real = hollow.find_sources(model, slots, shapes), dict[str, torch.Tensor]()
    quantized = {}
    for name, source in sources.items():
        if source in homes:
            quantized[name.removesuffix(".weight")] = homes[source]
            continue
        slot = slots[name]
        if source not in real:
            real[source] = _floats(view, source, slot.meta)
        slot.table[slot.key] = real[source]
    strange = sorted(set(view.modules) - set(quantized.values()))
    if strange:
        raise InputError(
            f"[load] wanted modules of {type(model).__name__}, got {strange[0]} quantized"
        )
    return quantized


def _floats(view: Dense, source: str, meta: torch.Tensor) -> torch.Tensor:
    array = view.read(source)
    if array.dtype.kind not in "fV" or array.dtype.itemsize == 1:
        raise InputError(f"[load] wanted floats in tensor {source}, got {array.dtype}")
    tensor = as_tensor(array).to(meta.dtype)
    if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
        raise InputError(f"[load] wanted finite weights, got NaN or infinity in {source}")
    tensor = nn.Parameter(tensor, False) if isinstance(meta, nn.Parameter) else tensor
    mark_initialised(tensor)
    return tensor


def _replace(
    model: PreTrainedModel, view: Dense, homes: Mapping[str, str], config: BitwrightConfig
) -> tuple[dict[str, str], list[str]]:
    """Puts the quantized linears in; their schemes by name, and those with an order."""
    found, ordered = {}, []
    for path, home in homes.items():
        module: Any = model.get_submodule(path)
        if not is_linear(module):
            raise InputError(
                f"[load] wanted linears quantized, got {path}, {type(module).__name__}"
            )
        q = own.exact(home, view.stored(home))
        if q.shape != shape_of(module):
            raise InputError(
                f"[load] wanted {home} of shape {shape_of(module)} as the config asks, got "
                f"{q.shape}"
            )
        layer = QuantLinear.of(q, module.bias, config.mode, config.activations)
        model.set_submodule(path, layer.train(False))
        found[path] = q.scheme.name
        ordered += [path] if q.order is not None else []
    return found, ordered


def _settle(model: Any, folder: Path, config: BitwrightConfig) -> None:
    """What from_pretrained leaves on a model, so that generate and save_pretrained find it."""
    named: Mapping[str, str] = config.schemes
    config.scheme = Counter(named.values()).most_common(1)[0][0]
    config.schemes = {name: scheme for name, scheme in named.items() if scheme != config.scheme}
    model.tie_weights()
    share(model)
    set_fused(model, config.fused)
    model.config.quantization_config = config
    model.config.name_or_path = model.name_or_path = str(folder)
    model.is_quantized, model.quantization_method = True, config.quant_method
    model.hf_quantizer = BitwrightQuantizer(config, pre_quantized=True)
    if (folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:
            raise InputError(
                f"[load] could not read {folder}/generation_config.json: {error}"
            ) from error
