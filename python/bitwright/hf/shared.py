"""Linears that read one input, multiplied in one call.

q, k and v, or gate and up: activations are rounded once and the cost of a call is paid once. The
first one that is asked multiplies by all of them, the others take theirs when they are asked about
the same tensor, unchanged; under inference_mode, where torch does not tell whether a tensor was
changed, each goes alone. Which linears share an input is what the architecture declares (archs);
linears of other models go alone. The results are those of single calls, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from transformers import PreTrainedModel

from bitwright import archs, ops
from bitwright.calib import hollow
from bitwright.hf.product import Activations, Mode, product, products
from bitwright.spec import Arch


class Layer(Protocol):
    """A quantized linear, as much of it as is asked here."""

    mode: Mode
    activations: Activations

    def matrix(self) -> ops.PackedMatrix: ...


class _Made(NamedTuple):
    """Products of one tensor that nobody has taken yet, by the layer's id."""

    x: torch.Tensor
    version: int
    products: dict[int, torch.Tensor]


class Shared:
    """Quantized linears with one input. Threads may run the model at once: what was made for one
    tensor is never given for another."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self.made: _Made | None = None

    def product(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        """x times the weight of `layer`, one of these."""
        if x.is_inference():
            return product(x, layer.matrix(), layer.mode, layer.activations)
        made = self.made
        if made is not None and made.x is x and made.version == x._version:
            y = made.products.pop(id(layer), None)
            if y is not None:
                self.made = made if made.products else None
                return y
        mode, activations = layer.mode, layer.activations
        if any((other.mode, other.activations) != (mode, activations) for other in self.layers):
            return product(x, layer.matrix(), mode, activations)
        ys = products(x, [other.matrix() for other in self.layers], mode, activations)
        found = {id(other): y for other, y in zip(self.layers, ys, strict=True)}
        mine = found.pop(id(layer))
        self.made = _Made(x, x._version, found)
        return mine


def inputs_of(arch: Arch) -> list[list[str]]:
    """Names inside a block of the linears that share an input: a group, and v with its q and k."""
    found: list[list[str]] = []
    for group in arch.groups:
        names = [linear.name for linear in group.linears]
        if group.inside_attention and found:
            found[-1] += [name for name in names if name not in found[-1]]
        else:
            found.append(names)
    return [names for names in found if len(names) > 1]


def share(model: PreTrainedModel) -> None:
    """Let the quantized linears of a declared architecture that share an input know each other."""
    arch = archs.find(model.config.to_dict())
    if arch is None:
        return
    _, blocks = hollow.find_blocks(model)
    for block in blocks:
        modules: dict[str, Any] = dict(block.named_modules())
        for names in inputs_of(arch):
            layers = [modules[name] for name in names if name in modules]
            able = [x for x in layers if getattr(x, "packed", False) and not x.ordered]
            if len(able) > 1:
                shared = Shared(able)
                for layer in able:
                    layer.shared = shared
