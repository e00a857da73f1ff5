"""Decoder layers that run in one call of the core.

A block of the Llama kind (archs: `fused`) is some 50 small operations of torch; at one token a step
their calls, not the weights, are the time. `set_fused(model)` gives each such layer a class that tries
`ops.blocks` first: norms, q k v, rotary positions, attention over the cache, o, gate, up, SiLU,
down. Inside a block it rounds less than bfloat16 layers do; else the results are theirs.

The layer goes on as it was, whole, wherever it is asked for something else: gradients, training,
torch.compile, other caches, masks that are not boolean ones of sdpa, full sliding windows, hooks
on its parts or parts that were replaced. `fusion(model)` says which layers are ready and why not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import DynamicCache, PreTrainedModel

from bitwright import archs, ops
from bitwright.calib import hollow
from bitwright.calib.skeleton import as_tensor
from bitwright.hf.linear import QuantLinear
from bitwright.hf.store import Roomy, roomy
from bitwright.spec import Arch, U8

ROLES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
DTYPES = (torch.float32, torch.bfloat16)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class NotFused(Exception):
    """Why a block does not run in one call."""


class Plan:
    """One layer as the core takes it, and what has to be as it was for that to hold."""

    def __init__(self, layer: nn.Module, arch: Arch, heads: int) -> None:
        self.parts: list[tuple[dict[str, Any], str, Any]] = []
        self.tensors: list[tuple[dict[str, Any], str, torch.Tensor, int]] = []
        self.layer = layer
        names = {role: one.name for g in arch.groups for one in g.linears for role in one.roles}
        self.linears = [self._linear(names[role]) for role in ROLES]
        self.kept = [one.matrix() for one in self.linears]
        first = self.linears[0]
        self.mode, self.activations = first.mode, first.activations
        if any((x.mode, x.activations) != (first.mode, first.activations) for x in self.linears):
            raise NotFused("its linears are not all in one mode")
        attention = self._part(names["attn.q"].rpartition(".")[0])
        self._part(names["mlp.gate"].rpartition(".")[0])
        norms = [self._norm(g.norm) for g in arch.groups if g.norm and not g.inside_attention]
        told = arch.fused
        if told is None or len(norms) != 2:
            raise NotFused("its architecture is not declared as one of the Llama kind")
        path = names["attn.q"].rpartition(".")[0]
        if hasattr(attention, told.head_norms[0]):
            norms += [self._norm(f"{path}.{name}") for name in told.head_norms]
        epsilons = {float(norm.variance_epsilon) for norm in norms}
        if len(epsilons) != 1:
            raise NotFused(f"its norms have epsilons {sorted(epsilons)}")
        self.index, self.width = int(attention.layer_idx), int(attention.head_dim)
        self.kv_heads = self.linears[1].out_features // self.width
        self.block = ops.DecoderBlock(
            tuple(self.kept),
            np.concatenate([self._floats(norm, "weight") for norm in norms]),
            self._biases(),
            heads,
            self.kv_heads,
            epsilons.pop(),
            float(attention.scaling),
            bool(getattr(attention, told.turned, True)),
            self.mode,
            self.activations,
        )

    def _part(self, path: str) -> Any:
        parent, name = path.rpartition(".")[::2]
        table = self.layer.get_submodule(parent)._modules
        module: Any = table[name]
        if module is None or "forward" in vars(module):
            raise NotFused(f"{path} was replaced")
        self.parts.append((table, name, module))
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
        self.tensors.append((module._parameters, name, value, value._version))
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
        for table, name, module in self.parts:
            if table.get(name) is not module or "forward" in module.__dict__:
                return False
        for one, kept in zip(self.linears, self.kept, strict=True):
            known = one._kept
            if known is None or known[1] is not kept or known[0] is not one.panels:
                return False
            if one.mode != self.mode or one.activations != self.activations:
                return False
        return all(
            table.get(name) is value and value._version == version
            for table, name, value, version in self.tensors
        )

    def watched(self) -> bool:
        """Whether somebody has hooks on a part, or gradients of a weight are wanted."""
        hooked = any(getattr(m, name) for _, _, m in self.parts for name in HOOKS)
        grads = torch.is_grad_enabled() and any(x.requires_grad for _, _, x, _ in self.tensors)
        return hooked or grads


class Shared:
    """What the layers of one model share: its architecture, and the arrays of the tensors that all
    of them are given in a step."""

    def __init__(self, model: PreTrainedModel, arch: Arch) -> None:
        self.arch, self.config = arch, model.config.get_text_config()
        self.heads = int(self.config.num_attention_heads)
        self.turns: tuple[Any, ...] = ()
        self.masks: tuple[Any, ...] = ()

    def cos_sin(self, given: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Of (cos, sin), (1 or batch, t, width) each."""
        known = self.turns
        if not known or known[0] is not given:
            arrays = [ops.as_numpy(x.reshape(-1, x.shape[-1])) for x in given]
            known = self.turns = (given, *arrays)
        return known[1], known[2]

    def mask(self, given: torch.Tensor | None, batch: int, t: int, keys: int) -> U8 | None:
        """Of sdpa's: none, or booleans (batch, 1, t, keys). None: another kind."""
        if given is None:
            return ops.NO_MASK if t in (1, keys) else None
        if given.dtype != torch.bool or given.ndim != 4 or given.shape[1:] != (1, t, keys):
            return None
        known = self.masks
        if not known or known[0] is not given:
            wide = given.expand(batch, 1, t, keys).reshape(batch * t, keys)
            known = self.masks = (given, ops.as_numpy(wide.view(torch.uint8)))
        found: U8 = known[1]
        return found


class FusedLayer(nn.Module):
    """Comes before a decoder layer's own class. fused: what `set_fused` gave it; why: what kept the last
    call, or the plan, from being one call, "" if nothing did."""

    fused: Shared
    plan: Plan | None
    why: str

    def forward(self, hidden_states: torch.Tensor, *args: Any, **given: Any) -> Any:
        """As the layer's own."""
        try:
            return self._in_one(hidden_states, args, given)
        except NotFused as reason:
            self.why = str(reason)
        return super().forward(hidden_states, *args, **given)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "plan": None}

    def ready(self) -> Plan:
        """The plan, made anew where something has changed; NotFused says why there is none."""
        plan = self.plan
        if plan is None or not plan.current():
            self.plan = None
            plan = self.plan = Plan(self, self.fused.arch, self.fused.heads)
        return plan

    def _in_one(
        self, x: torch.Tensor, args: tuple[Any, ...], given: Mapping[str, Any]
    ) -> torch.Tensor:
        if torch.compiler.is_compiling() or type(x) is not torch.Tensor or args[1:]:
            raise NotFused("torch.compile, or a tensor that is no plain one")
        if x.dtype not in DTYPES or x.device.type != "cpu" or x.ndim != 3 or self.training:
            raise NotFused("wanted evaluation in float32 or bfloat16 on the CPU")
        if (x.requires_grad and torch.is_grad_enabled()) or torch_module._has_any_global_hook():
            raise NotFused("gradients, or hooks on all modules")
        shared, plan = self.fused, self.ready()
        if shared.config._attn_implementation != "sdpa" or given.get("output_attentions"):
            raise NotFused("attention other than sdpa, or its weights asked for")
        if plan.watched():
            raise NotFused("hooks on its parts, or gradients of its norms")
        batch, t, hidden = x.shape
        kept = self._kept(plan, given, batch, t, x.dtype)
        past = kept.length
        mask = args[0] if args else given.get("attention_mask")
        seen = shared.mask(mask, batch, t, past + t)
        turns = given.get("position_embeddings")
        if seen is None or not isinstance(turns, tuple) or turns[0].dtype != x.dtype:
            raise NotFused("a mask that is no boolean one of sdpa, or unknown positions")
        cos, sin = shared.cos_sin(turns)
        y = ops.blocks(
            ops.as_numpy(x).reshape(batch * t, hidden), [plan.block], cos, sin, [kept.store],
            batch=batch, past=past, mask=seen,
        )  # fmt: skip
        kept.grown(t)
        self.why = ""
        return as_tensor(y).view(batch, t, hidden)

    def _kept(
        self, plan: Plan, given: Mapping[str, Any], batch: int, t: int, dtype: torch.dtype
    ) -> Roomy:
        """The cache's layer with room for t more tokens; without a cache one for this call."""
        cache = given.get("cache", given.get("past_key_values"))
        if cache is None:
            layer = roomy(DynamicCache(), 0)
        else:
            layer = roomy(cache, plan.index)
        if layer is None or not layer.room_left(t):
            raise NotFused("a cache of another kind, or a sliding window that is full")
        if not layer.reserve(batch, plan.kv_heads, t, plan.width, dtype):
            raise NotFused("a cache of another shape")
        return layer


_CLASSES: dict[type, type] = {}


def _class_of(kind: type) -> type:
    """The class that tries one call first, under the name of the plain one."""
    if kind not in _CLASSES:
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        _CLASSES[kind] = type(kind.__name__, (FusedLayer, kind), names)
    return _CLASSES[kind]


def set_fused(model: PreTrainedModel, fused: bool = True) -> None:
    """Whether the decoder layers of a declared architecture run in one call where they can."""
    config = model.config.to_dict()
    arch = archs.find(config)
    if arch is None or archs.not_fused(config):
        return
    shared = Shared(model, arch)
    for layer in hollow.find_blocks(model)[1]:
        kind: type = type(layer)
        if fused and not issubclass(kind, FusedLayer):
            layer.__class__ = _class_of(kind)
            layer.fused, layer.plan, layer.why = shared, None, ""
        elif not fused and issubclass(kind, FusedLayer):
            layer.__class__ = kind.__mro__[2]
            for name in ("fused", "plan", "why"):
                delattr(layer, name)


def fusion(model: PreTrainedModel) -> dict[str, str]:
    """Of every decoder layer: "" if it is ready to run in one call, else why it is not."""
    path, layers = hollow.find_blocks(model)
    found = {}
    for i, layer in enumerate(layers):
        told = archs.not_fused(model.config.to_dict()) or "it was not asked for"
        if isinstance(layer, FusedLayer):
            try:
                layer.ready()
                told = ""
            except NotFused as reason:
                told = str(reason)
        found[f"{path}.{i}"] = told
    return found
