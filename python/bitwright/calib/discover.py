"""Groups of an architecture that nobody declared.

One small batch runs through every block; linears that are given the same tensor share statistics
and form a group; groups come in the order in which they fire. There are no roles and no norms, so
RTN and GPTQ work, transforms and formats that need roles do not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from bitwright.calib.skeleton import Skeleton
from bitwright.spec import Arch, Group, Linear, RefusedError

TOKENS = 8


@torch.inference_mode()
def discover(skeleton: Skeleton) -> Arch:
    """The groups of a model's blocks, `declared=False`.

    RefusedError where blocks differ from one another or hold no linear that runs."""
    hidden = skeleton.embed(torch.arange(TOKENS)[None])
    skeleton.empty()
    groups: tuple[Group, ...] | None = None
    for i in range(skeleton.count):
        with skeleton.block(i) as block:
            found = _groups(skeleton, i, block, hidden)
        if groups is not None and groups != found:
            raise RefusedError(
                f"[discover] wanted blocks that are all alike, got {skeleton.path(i)} of "
                f"{type(skeleton.model).__name__} with other linears than {skeleton.path(0)}"
            )
        groups = found
    return Arch(
        name=skeleton.model.config.model_type,
        blocks=skeleton.block_path,
        groups=groups or (),
        embeddings=(skeleton.embeddings,),
        head=skeleton.head,
        declared=False,
    )


def _groups(
    skeleton: Skeleton, i: int, block: nn.Module, hidden: torch.Tensor
) -> tuple[Group, ...]:
    seen: dict[str, tuple[nn.Module, torch.Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(_note(seen, name))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    try:
        skeleton.forward_block(i, hidden)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise RefusedError(f"[discover] wanted linears in {skeleton.path(i)}, got none that run")
    return _share(seen)


def _note(seen: dict[str, tuple[nn.Module, torch.Tensor]], name: str) -> Any:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.setdefault(name, (module, args[0]))

    return hook


def _share(seen: dict[str, tuple[nn.Module, torch.Tensor]]) -> tuple[Group, ...]:
    """Linears by the memory that they read; the tensors still live, so equal means the same."""
    groups: dict[tuple[Any, ...], list[Linear]] = {}
    for name, (module, x) in seen.items():
        key = (x.data_ptr(), x.shape, x.stride())
        linear = Linear(name, (), transposed=isinstance(module, Conv1D))
        groups.setdefault(key, []).append(linear)
    return tuple(Group(tuple(linears)) for linears in groups.values())
