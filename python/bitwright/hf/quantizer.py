"""What transformers asks of a quantization method, for format `bitwright`.

    from_pretrained(folder)                                       a folder in our format
    from_pretrained(float_folder, quantization_config=BitwrightConfig(scheme="int4-g64"))

In the first case the linears that the file has as codes are replaced, on the meta device, by
QuantLinears whose buffers the loader fills; they are packed one by one when it is done. In the
second each weight is rounded to nearest (data-free) as the loader hands it over, so that one float
matrix is in memory at a time. `save_pretrained` writes the file's tensors in either case.

The registration is what `import bitwright.hf` does. Without it transformers knows no method
"bitwright": it says so in a warning and gives the quantized linears random weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitwright.calib import hollow
from bitwright.files.safetensors import Entry, SafetensorsFile
from bitwright.formats import bitwright as own
from bitwright.hf.fused import set_fused
from bitwright.hf.linear import QuantLinear
from bitwright.hf.product import Activations, Mode
from bitwright.hf.shared import share
from bitwright.matrix import quantize_matrix
from bitwright.recipe import matches
from bitwright.spec import InputError, Scheme

NAME = own.METHOD
LOADING = ("mode", "activations", "fused")  # of this process, not of the file


class BitwrightConfig(QuantizationConfigMixin):
    """What config.json says of a quantized model, or what is to be done on the fly.

    scheme: of all linears in the blocks but those named in schemes (name -> scheme). skip: shell
    patterns, or "re:" and a regular expression, of linears that stay in float. mode, activations:
    how products are made (QuantLinear), fused: whether decoder layers run in one call where they
    can; not stored. ordered: modules with columns in act-order.
    """

    def __init__(
        self,
        scheme: str = "int4-g64",
        *,
        skip: Sequence[str] = (),
        schemes: Mapping[str, str] | None = None,
        ordered: Sequence[str] = (),
        mode: Mode = "fast",
        activations: Activations = "group",
        fused: bool = True,
        version: str | None = None,
        quant_method: str = NAME,
        **unknown: Any,
    ) -> None:
        if unknown or quant_method != NAME:
            told = ", ".join(unknown) or f"quant_method {quant_method!r}"
            raise InputError(f"[hf] wanted the settings of a bitwright config, got {told}")
        self.quant_method: Any = NAME
        self.version = version or version_of("bitwright")
        self.scheme, self.schemes = scheme, schemes or {}
        self.skip, self.ordered = skip, ordered
        self.mode, self.activations, self.fused = mode, activations, fused

    def get_loading_attributes(self) -> dict[str, Any]:
        """What an argument of from_pretrained may say about a model that is quantized already."""
        return {name: getattr(self, name) for name in LOADING}

    def to_dict(self) -> dict[str, Any]:
        """As it stands in config.json."""
        told = {k: v for k, v in super().to_dict().items() if k not in LOADING}
        return {k: v for k, v in told.items() if v or k not in ("skip", "ordered")}

    def scheme_of(self, name: str) -> Scheme:
        """The scheme of a module."""
        return own.scheme(name, {"scheme": self.scheme, "schemes": self.schemes})

    def check(self) -> None:
        """BitwrightError unless the settings can be used."""
        lists = all(
            isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
            for names in (self.skip, self.ordered)
        )
        if not isinstance(self.schemes, Mapping) or not lists or not isinstance(self.scheme, str):
            raise InputError(
                "[hf] wanted a scheme, names with schemes, and lists of names as skip and ordered, "
                f"got {self.to_dict()!s:.200}"
            )
        for name in {self.scheme, *self.schemes.values()}:
            own.scheme("", {"scheme": name})
        for pattern in self.skip:
            matches(pattern, "")


def is_linear(module: nn.Module) -> bool:
    """Whether it multiplies by one matrix, as torch or GPT-2 has it."""
    return type(module) in (nn.Linear, Conv1D)


def shape_of(module: Any) -> tuple[int, int]:
    """(out, in) of a Linear or Conv1D."""
    rows, columns = (int(side) for side in module.weight.shape)
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def block_linears(model: PreTrainedModel) -> dict[str, Any]:
    """The linears in the decoder layers, by name."""
    path, blocks = hollow.find_blocks(model)
    found = blocks.named_modules(prefix=path)
    return {name: module for name, module in found if is_linear(module)}


def replacement(module: Any, scheme: Scheme, ordered: bool, config: BitwrightConfig) -> QuantLinear:
    """An empty QuantLinear on the meta device in place of a Linear or Conv1D."""
    (n, k), bias = shape_of(module), module.bias
    with torch.device("meta"):
        layer = QuantLinear(
            k, n, scheme,
            bias=bias is not None,
            dtype=torch.float32 if bias is None else bias.dtype,
            ordered=ordered, mode=config.mode, activations=config.activations,
        )  # fmt: skip
    return layer.train(module.training)


def quant_linears(model: nn.Module) -> Iterator[tuple[str, QuantLinear]]:
    """The quantized linears of a model, by name."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            yield name, module


def set_mode(model: nn.Module, mode: Mode, activations: Activations = "group") -> None:
    """How all quantized linears of a model make their products from now on."""
    for _, layer in quant_linears(model):
        layer.set_mode(mode, activations)


class Rounding(ConversionOps):
    """Takes each float weight of the loader, rounds it and gives it to its QuantLinear."""

    def convert(self, input_dict: dict[str, Any], *_: Any, **told: Any) -> dict[str, Any]:
        """Nothing is left for the loader to set."""
        full_layer_name, model = told["full_layer_name"], told["model"]
        (given,) = input_dict.values()
        weight = given[0] if isinstance(given, list) else given
        name = full_layer_name.rpartition(".")[0]
        layer = model.get_submodule(name)
        if not isinstance(layer, QuantLinear):
            raise InputError(f"[hf] wanted {name} as a linear to quantize, got {type(layer)}")
        if layer.transposed:
            weight = weight.T.contiguous()
        layer.hold(quantize_matrix(weight, scheme=layer.scheme))
        layer.float_weight(None)
        done = {f"{name}.{key}" for key in ("weight", *layer.layout())}
        (told.get("missing_keys") or set()).difference_update(done)
        return {}


class BitwrightQuantizer(HfQuantizer):
    """The method `bitwright` of transformers."""

    requires_calibration = False
    quantization_config: BitwrightConfig

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """InputError for settings that cannot be used, and for devices without kernels."""
        self.quantization_config.check()
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        wrong = [
            place for place in places if place not in (None, "cpu", "auto", torch.device("cpu"))
        ]
        if wrong:
            raise InputError(f"[hf] wanted the model on the CPU, got device_map {device_map!r}")

    def update_device_map(self, device_map: Any) -> Any:
        """The CPU, where the kernels are."""
        return device_map if device_map in (None, "cpu") else {"": "cpu"}

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        """Whether the loader hands a weight to `Rounding`."""
        name, part = param_name.rpartition(".")[::2]
        return (
            not self.pre_quantized
            and part == "weight"
            and isinstance(model.get_submodule(name), QuantLinear)
        )

    def get_quantize_ops(self) -> ConversionOps:
        """What happens to such a weight."""
        return Rounding()

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        if self.pre_quantized:
            self._replace_stored(model, _headers(checkpoint_files or ()))
        else:
            self._replace_float(model)
        return model

    def _replace_float(self, model: PreTrainedModel) -> None:
        config = self.quantization_config
        for name, module in block_linears(model).items():
            if any(matches(pattern, name) for pattern in config.skip):
                continue
            layer = replacement(module, config.scheme_of(name), False, config)
            layer.float_weight(module.weight, transposed=isinstance(module, Conv1D))
            model.set_submodule(name, layer)

    def _replace_stored(self, model: PreTrainedModel, stored: Mapping[str, Entry]) -> None:
        """InputError where file and model do not agree about a quantized linear."""
        config = self.quantization_config
        linears = {name: m for name, m in model.named_modules() if is_linear(m)}
        in_blocks = block_linears(model)
        for name, module in linears.items():
            path = _spelled(model, name, stored)
            if path is not None:
                layer = replacement(module, config.scheme_of(path), path in config.ordered, config)
                layer.float_weight(None)
                _check(path, layer, stored)
                model.set_submodule(name, layer)
            elif name in in_blocks and not any(
                f"{p}.weight" in stored for p in _spellings(model, name)
            ):
                raise InputError(f"[hf] wanted {name}.codes or .weight in the file, found neither")

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_: Any
    ) -> PreTrainedModel:
        for name, layer in quant_linears(model):
            layer.settle(name)
        share(model)
        set_fused(model, self.quantization_config.fused)
        return model

    def is_serializable(self) -> bool:
        """save_pretrained writes the file's tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The product is one op to torch.compile."""
        return True


def _headers(files: Sequence[str]) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for file in files:
        found.update(SafetensorsFile(Path(file)).entries)
    return found


def _spellings(model: PreTrainedModel, name: str) -> tuple[str, ...]:
    prefix = f"{model.base_model_prefix}."
    return (name, name.removeprefix(prefix), prefix + name)


def _spelled(model: PreTrainedModel, name: str, stored: Mapping[str, Entry]) -> str | None:
    """The name of a quantized module in the file: with the base model's prefix or without."""
    return next((p for p in _spellings(model, name) if f"{p}.codes" in stored), None)


def _check(path: str, layer: QuantLinear, stored: Mapping[str, Entry]) -> None:
    for key, (kind, shape) in layer.layout().items():
        entry = stored.get(f"{path}.{key}")
        if entry is None or (entry.dtype, entry.shape) != (kind, shape):
            got = "none" if entry is None else f"{entry.dtype} {entry.shape}"
            raise InputError(
                f"[hf] wanted {path}.{key} as {kind} {shape}, as the config asks in "
                f"{layer.scheme.name}, got {got}"
            )


def register() -> None:
    """Tell transformers of the method; once."""
    if NAME not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(NAME)(BitwrightConfig)
        auto.register_quantizer(NAME)(BitwrightQuantizer)
        taken: Any = auto.LOADING_ATTRIBUTES_CONFIG_TYPES
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*taken, BitwrightConfig)
