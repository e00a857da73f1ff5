"""The product with a packed matrix: the kernel for torch tensors, and the same as an op of torch.

`product` calls the kernel. `quantized_linear` is the op "bitwright::linear" around it, for autograd
and torch.compile: its gradient goes to x alone, grad W with W dequantized, one matrix at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy.typing as npt
import torch

from bitwright import ops, schemes
from bitwright.calib.skeleton import as_tensor
from bitwright.spec import InputError

Mode = Literal["fast", "exact"]
Activations = Literal["group", "token"]


def matrix(
    panels: torch.Tensor, steps: torch.Tensor | None, scheme: str, n: int, k: int, whole: float
) -> ops.PackedMatrix:
    """The (n, k) matrix on the memory of its panels; steps and whole as in a QTensor."""
    known = None if steps is None else ops.as_numpy(steps.to(torch.float32))
    return ops.PackedMatrix(ops.as_numpy(panels), schemes.parse(scheme), (n, k), whole, known)


def product(
    x: torch.Tensor, packed: ops.PackedMatrix, mode: Mode, activations: Activations
) -> torch.Tensor:
    """x (..., k) times the matrix transposed, in x's dtype."""
    rows = _rows(x, packed.shape[1])
    y = as_tensor(ops.linear(rows, packed, mode=mode, activations=activations))
    return y.to(x.dtype).reshape(*x.shape[:-1], packed.shape[0])


def products(
    x: torch.Tensor, matrices: Sequence[ops.PackedMatrix], mode: Mode, activations: Activations
) -> list[torch.Tensor]:
    """The same of several matrices with as many columns."""
    rows = _rows(x, matrices[0].shape[1])
    ys = ops.linear(rows, matrices, mode=mode, activations=activations)
    return [as_tensor(y).to(x.dtype).reshape(*x.shape[:-1], y.shape[1]) for y in ys]


def _rows(x: torch.Tensor, k: int) -> npt.NDArray[Any]:
    if x.device.type != "cpu" or x.shape[-1] != k:
        raise InputError(
            f"[hf] wanted activations (..., {k}) on the CPU, got {tuple(x.shape)} on {x.device}"
        )
    given = x.to(torch.float32) if x.dtype == torch.float16 else x
    return ops.as_numpy(given.reshape(-1, k))


@torch.library.custom_op("bitwright::linear", mutates_args=(), device_types="cpu")
def quantized_linear(
    x: torch.Tensor,
    panels: torch.Tensor,
    steps: torch.Tensor | None,
    scheme: str,
    n: int,
    k: int,
    whole: float,
    mode: str,
    activations: str,
) -> torch.Tensor:
    """x (..., k) times the packed (n, k) matrix transposed."""
    packed = matrix(panels, steps, scheme, n, k, whole)
    return product(x, packed, cast(Mode, mode), cast(Activations, activations))


@quantized_linear.register_fake
def _(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], rest[3]))


@torch.library.custom_op("bitwright::linear_backward", mutates_args=(), device_types="cpu")
def quantized_backward(
    grad: torch.Tensor,
    panels: torch.Tensor,
    steps: torch.Tensor | None,
    scheme: str,
    n: int,
    k: int,
    whole: float,
) -> torch.Tensor:
    """grad (..., n) times the dequantized matrix."""
    W = ops.decode(ops.unpack_linear(matrix(panels, steps, scheme, n, k, whole)))
    return (grad.to(torch.float32) @ torch.from_numpy(W)).to(grad.dtype)


@quantized_backward.register_fake
def _(grad: torch.Tensor, *rest: Any) -> torch.Tensor:
    return grad.new_empty((*grad.shape[:-1], rest[4]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[1:3])
    ctx.rest = inputs[3:7]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return (quantized_backward(grad, *ctx.saved_tensors, *ctx.rest), *[None] * 8)


quantized_linear.register_autograd(_backward, setup_context=_keep)
