"""A linear layer of quantized weights on the CPU kernels.

Two forms. As in the file: buffers with the names and types of format `bitwright` (codes, scales,
zeros, ...), on any device; a loader fills them. Packed: `panels`, what the kernels read, in their
place; `state_dict` gives the file's tensors all the same, and `load_state_dict` packs.

    y = x[..., order] W^T + bias        W: the dequantized weight; order: where columns have one

mode "exact" multiplies dequantized weights in float32, "fast" rounds activations to int8: a scale
for each token and 128 columns of a group at most, with a second digit where that scale stands out
among the token's, or one for each token. Gradients flow to x, through W, and to the bias; the
weight has none, so adapters train on top. Activations are float32 or bfloat16; float16 goes through
float32.

Outside of tracing the kernel is called directly; torch's dispatcher (some 20 microseconds a call)
comes in where there are gradients, under torch.compile, and for tensors that are not plain ones.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from torch import nn

from bitwright import ops, schemes
from bitwright.calib.skeleton import as_tensor
from bitwright.formats import bitwright as own
from bitwright.hf.product import Activations, Mode, product, quantized_linear
from bitwright.hf.product import matrix as matrix_of
from bitwright.hf.shared import Shared
from bitwright.spec import InputError, QTensor, Scheme

MODES, ACTIVATIONS = ("fast", "exact"), ("group", "token")
PACKED = ("codes", "scales", "zeros")  # what the panels replace
TORCH_TYPES: dict[np.dtype[Any], torch.dtype] = {
    np.dtype(np.int8): torch.int8,
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float16): torch.float16,
    np.dtype(np.float32): torch.float32,
    ops.BFLOAT16: torch.bfloat16,
}


def mark_initialised(tensor: Any) -> None:
    """transformers gives what lacks this mark random numbers after loading."""
    tensor._is_hf_initialized = True


class QuantLinear(nn.Module):
    """A quantized (out_features, in_features) matrix in place of a Linear or Conv1D.

    scheme: a Scheme or its name. ordered: its columns have an order of their own. The buffers are
    empty until loaded, to_fill=False: not there until packed; `of` makes one from a QTensor.
    """

    codes: torch.Tensor
    order: torch.Tensor
    steps: torch.Tensor
    panels: torch.Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme | str,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        ordered: bool = False,
        mode: Mode = "fast",
        activations: Activations = "group",
        to_fill: bool = True,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.scheme = schemes.parse(scheme) if isinstance(scheme, str) else scheme
        self.ordered, self.whole = ordered, 1.0
        self.set_mode(mode, activations)
        for name, (kind, shape) in self.layout().items():
            made = torch.zeros(shape, dtype=TORCH_TYPES[kind]) if to_fill else None
            self.register_buffer(name, made)
        self.register_buffer("panels", None, persistent=False)
        self.transposed = False
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype)) if bias else None
        self.shared: Shared | None = None
        self._kept: tuple[torch.Tensor, ops.PackedMatrix] | None = None

    @classmethod
    def of(
        cls, q: QTensor | ops.QWords, bias: torch.Tensor | None = None, mode: Mode = "fast",
        activations: Activations = "group",
    ) -> QuantLinear:  # fmt: skip
        """The layer of a quantized matrix, packed."""
        n, k = q.shape
        layer = cls(
            k,
            n,
            q.scheme,
            ordered=q.order is not None,
            mode=mode,
            activations=activations,
            to_fill=False,
        )
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        layer.hold(q)
        return layer

    def set_mode(self, mode: Mode, activations: Activations = "group") -> None:
        """How products are made from now on."""
        if mode not in MODES or activations not in ACTIVATIONS:
            raise InputError(
                f"[hf] wanted mode {' or '.join(MODES)} and activations by "
                f"{' or '.join(ACTIVATIONS)}, got {mode!r} and {activations!r}"
            )
        self.mode, self.activations = mode, activations

    def float_weight(self, weight: nn.Parameter | None, transposed: bool = False) -> None:
        """The float parameter that a loader is to fill before it is rounded; transposed: stored as
        (in, out). None: an empty tensor in its place, since initialisers ask for one."""
        self._parameters.pop("weight", None)
        self._buffers.pop("weight", None)
        self.transposed = transposed
        if weight is None:
            self.register_buffer("weight", torch.zeros(0), persistent=False)
        else:
            self.register_parameter("weight", weight)

    def layout(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Names, dtypes and shapes of the tensors in a file."""
        shape = (self.out_features, self.in_features)
        named = own.layout("", shape, self.scheme, ops.BFLOAT16)
        found = {name.removeprefix("."): entry for name, entry in named.items()}
        if self.ordered:
            found["order"] = (np.dtype(np.int32), (self.in_features,))
        return found

    @property
    def packed(self) -> bool:
        """Whether the weight lies in panels."""
        return self.panels is not None

    @property
    def qweight(self) -> torch.Tensor | None:
        """Where PEFT looks for the device of a quantized layer."""
        return self.panels

    def hold(self, q: QTensor | ops.QWords) -> None:
        """Take the weight q, in panels, and its side tensors as in the file."""
        shape = (self.out_features, self.in_features)
        if q.shape != shape or q.scheme.name != self.scheme.name:
            raise InputError(
                f"[hf] wanted a weight {shape} in {self.scheme.name}, got {q.shape} in "
                f"{q.scheme.name}"
            )
        names = list(self.layout())
        tensors = own.extras("", q)
        for name in names:
            self._buffers[name] = None if name in PACKED else as_tensor(tensors[f".{name}"])
        self.panels, self.whole = torch.from_numpy(ops.pack_linear(q).panels), q.global_scale
        self.matrix()
        for tensor in (*self._buffers.values(), self.bias):
            if tensor is not None:
                mark_initialised(tensor)

    def settle(self, name: str) -> None:
        """What a loader leaves to be done: packing what it has filled; or taking the panels back,
        which it makes anew, empty, because no file has them."""
        self._buffers.pop("weight", None)
        if self._kept is None:
            self.pack(name)
        else:
            self.panels = self._kept[0]

    def pack(self, name: str = "weight") -> None:
        """Pack what a loader has filled; `name` stands in messages."""
        found = {f"{name}.{key}": ops.as_numpy(self._buffers[key]) for key in self.layout()}
        config = {"scheme": self.scheme.name, "ordered": [name] if self.ordered else []}
        self.hold(own.stored(name, found.__getitem__, config))

    def quantized(self) -> QTensor:
        """The weight as codes, scales and zero points."""
        q = ops.unpack_linear(self.matrix())
        order = ops.as_numpy(self.order) if self.ordered else None
        return QTensor(q.codes, q.scales, q.zeros, q.scheme, q.global_scale, q.steps, order)

    def dequantize(self) -> torch.Tensor:
        """The weight as floats, float32 (out_features, in_features)."""
        return torch.from_numpy(ops.decode(self.quantized()))

    def _steps(self) -> torch.Tensor | None:
        return self.steps if self.scheme.block else None

    def matrix(self) -> ops.PackedMatrix:
        """The weight as the kernel takes it, on the memory of the panels."""
        if self.panels is None:
            self.pack()
            return self.matrix()
        if self._kept is None or self._kept[0] is not self.panels:
            n, k = self.out_features, self.in_features
            made = matrix_of(self.panels, self._steps(), self.scheme.name, n, k, self.whole)
            self._kept = (self.panels, made)
        return self._kept[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.panels is None:
            self.pack()
        if self.ordered:
            x = x.index_select(-1, self.order)
        traced = torch.compiler.is_compiling() or type(x) is not torch.Tensor
        if traced or (x.requires_grad and torch.is_grad_enabled()):
            n, k = self.out_features, self.in_features
            y = quantized_linear(
                x, self.panels, self._steps(), self.scheme.name, n, k, self.whole,
                self.mode, self.activations,
            )  # fmt: skip
        else:
            y = self._product(x)
        biased: torch.Tensor = y if self.bias is None else y + self.bias
        return biased

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if self.shared is not None:
            return self.shared.product(self, x)
        return product(x, self.matrix(), self.mode, self.activations)

    def extra_repr(self) -> str:
        sizes = f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, scheme={self.scheme.name}, mode={self.mode}"

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Of `.to(dtype)` and the like the bias alone hears: the file's types are the format's."""
        buffers, self._buffers = self._buffers, {}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers = buffers
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed:
            tensors = own.write("", self.quantized(), ops.BFLOAT16)
            for name in PACKED:
                if f".{name}" in tensors:
                    destination[prefix + name] = as_tensor(tensors[f".{name}"])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        before, errors = dict(self._buffers), len(args[-1])
        if self.packed:
            self.panels = None
            for name, (kind, shape) in self.layout().items():
                self._buffers[name] = torch.zeros(shape, dtype=TORCH_TYPES[kind])
        super()._load_from_state_dict(state_dict, prefix, *args)
        told = all(prefix + name in state_dict for name in self.layout())
        if told and len(args[-1]) == errors and not self.codes.is_meta:
            self.pack(prefix.removesuffix(".") or "weight")
        elif before["panels"] is not None:
            self._buffers.update(before)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}
