"""The model's own forward with stubs in the place of its blocks.

Each stub notes what its block would get besides the hidden states (positions, the mask of its
layer type) and hands the hidden states through. The last one ends the forward, or returns given
hidden states so that the final norm and the head run by the model's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bitwright.spec import RefusedError


@dataclass(frozen=True)
class BlockCall:
    """The arguments of a block besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class _Stop(Exception):
    """Ends a forward that has served its purpose."""


class _Stub(nn.Module):
    """Calls `visit` in the place of a block and shows the attributes of the real one."""

    def __init__(self, real: nn.Module, visit: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__.update(real=real, visit=visit)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["real"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["visit"](*args, **kwargs)


class Walk:
    """One forward. last: what the last stub returns; None ends the forward there.

    tuples: whether blocks of this model return tuples. A model that expects them shows it by taking
    element 0 of a tensor; then `unpacked` is set and the walk is to be repeated."""

    def __init__(self, blocks: nn.ModuleList, last: torch.Tensor | None, tuples: bool) -> None:
        self.blocks, self.last, self.tuples = blocks, last, tuples
        self.calls: list[BlockCall] = []
        self.hidden = torch.empty(0)
        self.logits = torch.empty(0)
        self.unpacked = False

    def run(self, model: nn.Module, path: str, inputs: Mapping[str, Any]) -> Walk:
        """The forward of `model`, whose blocks lie at `path`."""
        parent, _, attribute = path.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, attribute, nn.ModuleList(_Stub(real, self._visit) for real in self.blocks))
        try:
            with suppress(_Stop):
                self.logits = model(**inputs, use_cache=False, return_dict=True).logits
        finally:
            setattr(owner, attribute, self.blocks)
        return self

    def _visit(self, *args: Any, **kwargs: Any) -> Any:
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), args)
        if self.calls and hidden is not self.hidden:
            self._explain(hidden)
        self.hidden = hidden
        self.calls.append(BlockCall(args, kwargs))
        if len(self.calls) == len(self.blocks):
            if self.last is None:
                raise _Stop
            hidden = self.last
        return (hidden,) if self.tuples else hidden

    def _explain(self, hidden: torch.Tensor) -> None:
        if hidden.ndim < self.hidden.ndim and not self.tuples:
            self.unpacked = True
            raise _Stop
        raise RefusedError(
            "[skeleton] wanted a model that hands a block's output to the next unchanged, got one "
            f"that changes it before block {len(self.calls)}"
        )


def same(a: Any, b: Any) -> bool:
    """Whether two arguments of a block (nested, with tensors) are equal."""
    if isinstance(a, torch.Tensor):
        return a is b or (isinstance(b, torch.Tensor) and torch.equal(a, b))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b)


def first(out: Any) -> torch.Tensor:
    """Hidden states from what a block returned: a tensor, or a tuple that starts with it."""
    hidden: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return hidden
