"""One decoder layer as the core takes it, and whether it still is what it was made of.

A plan holds as long as the layer's parts are the same modules, in the same mode, with the same
panels and with norms and biases that nobody has changed since; hooks on a part are asked for
apart, because a hook wants to see what the part does.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import nn

from bitwright import ops
from bitwright.hf.linear import QuantLinear
from bitwright.spec import Arch

ROLES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
CAPTURE = "output_capturing_hook"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class NotFused(Exception):
    """Why a block does not run in one call."""


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to see what goes into a module or comes out."""
    return any(getattr(module, name) for name in HOOKS)


def _only_captures(module: nn.Module) -> bool:
    """Whether its hooks are those of transformers for attention weights, which sdpa has not."""
    others = module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    names = {getattr(hook, "__name__", "") for hook in module._forward_hooks.values()}
    return not others and names == {CAPTURE}


class Plan:
    """One layer as the core takes it, and what has to be as it was for that to hold."""

    def __init__(self, layer: nn.Module, arch: Arch, heads: int) -> None:
        self.layer = layer
        self.modules: list[nn.Module] = []
        self.places: list[tuple[Mapping[str, Any], str]] = []
        self.values: list[Any] = []
        self.tensors: list[torch.Tensor] = []
        names = {role: one.name for g in arch.groups for one in g.linears for role in one.roles}
        self.linears = [self._linear(names[role]) for role in ROLES]
        first, matrices = self.linears[0], tuple(one.matrix() for one in self.linears)
        if any((x.mode, x.activations) != (first.mode, first.activations) for x in self.linears):
            raise NotFused("its linears are not all in one mode")
        attention = self._part(names["attn.q"].rpartition(".")[0])
        self._part(names["mlp.gate"].rpartition(".")[0])
        norms = [self._norm(g.norm) for g in arch.groups if g.norm and not g.inside_attention]
        told = arch.fused
        if told is None or len(norms) != 2:
            raise NotFused("its architecture is not declared as one of the Llama kind")
        path = names["attn.q"].rpartition(".")[0]
        if hasattr(attention, told[0]):
            norms += [self._norm(f"{path}.{name}") for name in told[:2]]
        epsilons = {float(norm.variance_epsilon) for norm in norms}
        if len(epsilons) != 1:
            raise NotFused(f"its norms have epsilons {sorted(epsilons)}")
        self.index, self.width = int(attention.layer_idx), int(attention.head_dim)
        self.kv_heads = self.linears[1].out_features // self.width
        self.block = ops.DecoderBlock(
            matrices,
            np.concatenate([self._floats(norm, "weight") for norm in norms]),
            self._biases(),
            heads,
            self.kv_heads,
            epsilons.pop(),
            float(attention.scaling),
            bool(getattr(attention, told[2], True)),
            first.mode,
            first.activations,
        )
        for one in self.linears:
            self._watch(one._buffers, "panels")
            self._watch(one._parameters, "bias")
            for name in ("_kept", "mode", "activations"):
                self._watch(vars(one), name)
        self.versions = [one._version for one in self.tensors]
        self.hooks = [getattr(one, name) for one in self.modules for name in HOOKS]

    def _watch(self, table: Mapping[str, Any], name: str) -> None:
        """The plan holds as long as this is what it is now."""
        self.places.append((table, name))
        self.values.append(table.get(name))

    def _part(self, path: str) -> Any:
        parent, name = path.rpartition(".")[::2]
        table = self.layer.get_submodule(parent)._modules
        module: Any = table[name]
        if module is None or "forward" in vars(module):
            raise NotFused(f"{path} was replaced")
        self.modules.append(module)
        self._watch(table, name)
        self._watch(vars(module), "forward")
        return module

    def _linear(self, path: str) -> QuantLinear:
        module = self._part(path)
        if type(module) is not QuantLinear:
            raise NotFused(f"{path} is not quantized")
        if module.ordered or not module.packed:
            raise NotFused(f"{path} has columns in act-order")
        return module

    def _norm(self, path: str) -> Any:
        module = self._part(path)
        if not type(module).__name__.endswith("RMSNorm") or not hasattr(module, "variance_epsilon"):
            raise NotFused(f"{path} is no RMS norm")
        return module

    def _floats(self, module: nn.Module, name: str) -> np.ndarray[Any, Any]:
        value = module._parameters[name]
        if value is None or value.is_inference():
            raise NotFused("torch does not tell when its norms change")
        self.tensors.append(value)
        self._watch(module._parameters, name)
        found: np.ndarray[Any, Any] = value.detach().float().numpy().ravel()
        return found

    def _biases(self) -> np.ndarray[Any, Any]:
        if all(one.bias is None for one in self.linears):
            return np.zeros(0, np.float32)
        return np.concatenate(
            [
                np.zeros(one.out_features, np.float32)
                if one.bias is None
                else self._floats(one, "bias")
                for one in self.linears
            ]
        )

    def current(self) -> bool:
        """Whether modules and weights are those that the plan was made of."""
        if not all(map(is_, [table.get(name) for table, name in self.places], self.values)):
            return False
        return [one._version for one in self.tensors] == self.versions

    def watched(self) -> bool:
        """Whether somebody has hooks on a part, or gradients of a weight are wanted."""
        if any(self.hooks) and any(has_hooks(m) and not _only_captures(m) for m in self.modules):
            return True
        return torch.is_grad_enabled() and any(one.requires_grad for one in self.tensors)
