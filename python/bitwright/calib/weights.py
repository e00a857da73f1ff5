"""The weights of a block while it is solved: float for one stream, solved for the other."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from bitwright.calib.skeleton import Skeleton, as_tensor
from bitwright.spec import Group, InputError

Weights = Mapping[str, npt.NDArray[np.float32]]


class BlockWeights:
    """Which weights of the linears are in place. both: float ones are kept beside the solved."""

    def __init__(self, skeleton: Skeleton, path: str, both: bool) -> None:
        self.skeleton, self.path, self.both = skeleton, path, both
        self.float: dict[str, torch.Tensor] = {}
        self.quantized: dict[str, torch.Tensor] = {}
        self.in_place = True  # the quantized ones, as far as there are any

    def solved(self, group: Group, weights: Weights) -> None:
        linears = {linear.name: linear for linear in group.linears}
        for short, weight in weights.items():
            if short not in linears:
                raise InputError(
                    f"[capture] wanted weights of {', '.join(linears)}, got weights of {short}"
                )
            tensor = as_tensor(weight)
            tensor = tensor.t() if linears[short].transposed else tensor
            name = f"{self.path}.{short}.weight"
            self.use(quantized=True)
            if self.both:
                self.float.setdefault(name, self.skeleton.get(name))
            self.skeleton.put(name, tensor)
            if self.both:
                self.quantized[name] = self.skeleton.get(name)

    def use(self, quantized: bool) -> None:
        """Put the weights of that stream in place."""
        if quantized == self.in_place:
            return
        for name, tensor in (self.quantized if quantized else self.float).items():
            self.skeleton.put(name, tensor)
        self.in_place = quantized
