"""Float weights of any checkpoint, under the names of the float model."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from bitwright import archs, ops, registry
from bitwright.files.checkpoint import Checkpoint
from bitwright.formats.settings import SETTINGS, require_known
from bitwright.spec import InputError, QTensor, Scheme

DEPTH = 3  # names below a module path: "weight.quant_state.bitsandbytes__nf4"


class Dense:
    """A view of a checkpoint: quantized modules appear as "<module>.weight", float32, as the
    float model stores them: (out, in), or (in, out) where the architecture says so."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config: dict[str, Any] = checkpoint.config.get("quantization_config") or {}
        self.format: ModuleType | None = None
        self.modules: tuple[str, ...] = ()
        if self.config:
            method = str(self.config.get("quant_method", "")).replace("_", "-")
            if method not in registry.readers():
                raise InputError(
                    f"[dense] wanted a checkpoint in one of {', '.join(registry.readers())}, got "
                    f"quant_method {method!r} in {checkpoint.path}"
                )
            self.format = registry.get("formats", method)
            require_known(method, self.config, SETTINGS[method])
            self.modules = tuple(self.format.quantized(self.config, checkpoint.entries))
        self._shapes = {name: entry[0] for name, entry in checkpoint.entries.items()}
        self._quantized = {f"{module}.weight": module for module in self.modules}
        arch = archs.find(checkpoint.config)
        linears = [] if arch is None else [x for group in arch.groups for x in group.linears]
        self._transposed = tuple(f".{x.name}.weight" for x in linears if x.transposed)

    def owner(self, tensor: str) -> str | None:
        """The quantized module whose weight a tensor of the checkpoint is part of."""
        if tensor.endswith(".bias"):
            return None
        parts = tensor.split(".")
        paths = (".".join(parts[:-i]) for i in range(1, DEPTH + 1))
        return next((path for path in paths if f"{path}.weight" in self._quantized), None)

    def names(self) -> list[str]:
        """Names of the float model's tensors, in the order of the checkpoint."""
        owners = ((name, self.owner(name)) for name in self.checkpoint.entries)
        return list(dict.fromkeys(f"{own}.weight" if own else name for name, own in owners))

    def shape(self, name: str) -> tuple[int, ...]:
        if self.format is None or name not in self._quantized:
            return self._shapes[name]
        n, k = self.format.shape(self._quantized[name], self._shapes, self.checkpoint.read)
        return (k, n) if name.endswith(self._transposed) else (n, k)

    def scheme(self, module: str) -> Scheme:
        """The scheme of a quantized module, without reading its codes."""
        if self.format is None:
            raise InputError(f"[dense] wanted {module} quantized, {self.checkpoint.path} is float")
        found: Scheme | None = self.format.scheme(module, self.config, self.checkpoint.read)
        if found is None:
            raise InputError(f"[dense] wanted the scheme of {module} in the config, found none")
        return found

    def quantized(self, module: str) -> QTensor:
        """The QTensor of a quantized module."""
        return ops.unpacked(self.stored(module))

    def stored(self, module: str) -> QTensor | ops.QWords:
        """The same, its codes packed and unread where the format can do so."""
        if self.format is None:
            raise InputError(f"[dense] wanted {module} quantized, {self.checkpoint.path} is float")
        checkpoint = self.checkpoint
        q: QTensor | ops.QWords = self.format.stored(
            module, checkpoint.read, self.config, checkpoint.rows
        )
        return q

    def read(self, name: str) -> npt.NDArray[Any]:
        """A float tensor; quantized ones dequantized to float32."""
        module = self._quantized.get(name)
        if module is None:
            return self.checkpoint.read(name)
        W = ops.decode(self.quantized(module))
        return np.ascontiguousarray(W.T) if name.endswith(self._transposed) else W


def dense(checkpoint: Checkpoint) -> Dense:
    """The float view of a checkpoint, quantized by a known format or not at all."""
    return Dense(checkpoint)


def open_dense(folder: str | Path) -> Dense:
    """The float view of a checkpoint folder: `read(name)` gives any tensor, quantized ones as
    float32."""
    return Dense(Checkpoint(Path(folder)))
