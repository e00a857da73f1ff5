"""Decoder layers that run in one call of the core.

A block of the Llama kind (archs: `fused`) is some 50 small operations of torch; at one token a step
their calls, not the weights, are the time. `set_fused(model)` gives each such layer a class that
tries `ops.blocks` first: norms, q k v, rotary positions, attention over the cache, o, gate, up,
SiLU, down. Under the model's own loop the first layer runs all that are ready behind it as well,
and those hand on what they get. Inside a block it rounds less than bfloat16 layers do; else the
results are theirs.

A layer goes on as it was, whole, wherever it is asked for something else: gradients, training,
torch.compile, other caches, masks that are not boolean ones of sdpa, full sliding windows, hooks
on its parts or parts that were replaced. `fusion(model)` says which layers are ready and why not.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import wraps
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import DynamicCache, PreTrainedModel

from bitwright import archs, ops
from bitwright.calib import hollow
from bitwright.calib.skeleton import as_tensor
from bitwright.hf.head import set_head
from bitwright.hf.plan import NotFused, Plan, has_hooks
from bitwright.hf.store import Roomy, roomy
from bitwright.spec import U8, Arch

DTYPES = (torch.float32, torch.bfloat16)


class Run(threading.local):
    """One pass of this thread through the model's loop. inside: there is one. result: what the
    layers up to `following` have made; those behind the first hand it on."""

    inside = False
    result: torch.Tensor | None = None
    following = 0
    end = 0

    def made(self, result: torch.Tensor, following: int, end: int) -> None:
        """Note what the layers following .. end - 1 are to hand on."""
        self.following, self.end = following, end
        self.result = result if following < end else None

    def hands_on(self, x: torch.Tensor, position: int) -> bool:
        """Whether the layer at this position has run already, and x is the result."""
        if self.result is None or x is not self.result or position != self.following:
            return False
        self.following += 1
        if self.following == self.end:
            self.result = None
        return True


class Shared:
    """What the layers of one model share: its architecture, their list, the arrays of the tensors
    that all of them are given in a step."""

    def __init__(self, model: PreTrainedModel, arch: Arch, layers: nn.ModuleList) -> None:
        self.arch, self.config = arch, model.config.get_text_config()
        self.layers: list[Any] = list(layers)
        self.run = Run()
        self.heads = int(self.config.num_attention_heads)
        self.turns: tuple[Any, ...] = ()
        self.masks: tuple[Any, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "run": None, "turns": (), "masks": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.run = Run()

    def cos_sin(self, given: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Of (cos, sin), (1 or batch, t, width) each."""
        known = self.turns
        if not known or known[0] is not given:
            arrays = [ops.as_numpy(x.reshape(-1, x.shape[-1])) for x in given]
            known = self.turns = (given, *arrays)
        return known[1], known[2]

    def extend(self, step: Step, first: FusedLayer) -> None:
        """Take in the layers behind the first that are ready, where the model's loop asks them all
        and nobody wants to see what passes between them."""
        if not self.run.inside or has_hooks(first):
            return
        for layer in self.layers[first.position + 1 : self.config.num_hidden_layers]:
            if not isinstance(layer, FusedLayer) or has_hooks(layer):
                return
            try:
                step.add(layer)
            except NotFused:
                return

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


class Step(NamedTuple):
    """What one call of a layer is about, and what the layers behind it have in common with it."""

    x: torch.Tensor
    cache: Any
    kept: list[Roomy]
    plans: list[Plan]

    def add(self, layer: FusedLayer) -> None:
        """The layer's plan and the room for its keys; NotFused says why it cannot take part."""
        plan, (batch, t, _) = layer.ready(), self.x.shape
        if plan.watched():
            raise NotFused("hooks on its parts, or gradients of its norms")
        if self.cache is None:  # one block after the other: they may share what is forgotten
            room = self.kept[0] if self.kept else roomy(DynamicCache(), 0)
        else:
            room = roomy(self.cache, plan.index)
        if room is None or not room.room_left(t):
            raise NotFused("a cache of another kind, or a sliding window that is full")
        if not room.reserve(batch, plan.kv_heads, t, plan.width, self.x.dtype):
            raise NotFused("a cache of another shape")
        if self.kept and room.length != self.kept[0].length:
            raise NotFused("caches of unequal length")
        self.kept.append(room)
        self.plans.append(plan)


class FusedLayer(nn.Module):
    """Comes before a decoder layer's own class. fused: what `set_fused` gave it; position: in the
    list; why: what kept the last call from being one, "" if nothing did."""

    fused: Shared
    position: int
    plan: Plan | None
    why: str

    def forward(self, hidden_states: torch.Tensor, *args: Any, **given: Any) -> Any:
        """As the layer's own."""
        if self.fused.run.hands_on(hidden_states, self.position):
            return hidden_states
        try:
            y = self._in_one(hidden_states, args, given)
        except NotFused as reason:
            self.why = str(reason)
        else:
            self.why = ""
            return y
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
        hooks: Any = torch_module._has_any_global_hook
        if (x.requires_grad and torch.is_grad_enabled()) or hooks():
            raise NotFused("gradients, or hooks on all modules")
        shared = self.fused
        if shared.config._attn_implementation != "sdpa" or given.get("output_attentions"):
            raise NotFused("attention other than sdpa, or its weights asked for")
        step = Step(x, given.get("cache", given.get("past_key_values")), [], [])
        step.add(self)
        (batch, t, hidden), past = x.shape, step.kept[0].length
        mask = args[0] if args else given.get("attention_mask")
        seen = shared.mask(mask, batch, t, past + t)
        turns = given.get("position_embeddings")
        if seen is None or not isinstance(turns, tuple) or turns[0].dtype != x.dtype:
            raise NotFused("a mask that is no boolean one of sdpa, or unknown positions")
        shared.extend(step, self)
        y = ops.blocks(
            ops.as_numpy(x).reshape(batch * t, hidden), [plan.block for plan in step.plans],
            *shared.cos_sin(turns), [room.store for room in step.kept],
            batch=batch, past=past, mask=seen,
        )  # fmt: skip
        for room in step.kept if step.cache is not None else ():
            room.grown(t)
        made = as_tensor(y).view(batch, t, hidden)
        shared.run.made(made, self.position + 1, self.position + len(step.plans))
        return made


class FusedModel(nn.Module):
    """Comes before the class of the model that has the layers."""

    fused: Shared

    def forward(self, *args: Any, **given: Any) -> Any:
        """As the model's own; its layers know that they are asked in a row."""
        run = self.fused.run
        run.inside, run.result = True, None
        try:
            return super().forward(*args, **given)
        finally:
            run.inside, run.result = False, None


_CLASSES: dict[type, type] = {}


def _class_of(first: type[FusedLayer | FusedModel], kind: type) -> type:
    """`kind` with `first` before it, under its own name."""
    if kind not in _CLASSES:
        plain: Any = kind

        @wraps(plain.forward)
        def forward(self: Any, *args: Any, **given: Any) -> Any:
            return first.forward(self, *args, **given)

        names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
        _CLASSES[kind] = type(kind.__name__, (first, kind), {**names, "forward": forward})
    return _CLASSES[kind]


def set_fused(model: PreTrainedModel, fused: bool = True) -> None:
    """Whether the decoder layers of a declared architecture run in one call where they can, and the
    head has its way for few tokens."""
    set_head(model, fused)
    config = model.config.to_dict()
    arch = archs.find(config)
    if arch is None or archs.not_fused(config):
        return
    path, layers = hollow.find_blocks(model)
    _unfuse(model.get_submodule(path.rpartition(".")[0]), layers)
    if not fused:
        return
    shared = Shared(model, arch, layers)
    every: list[Any] = list(layers)
    for position, layer in enumerate(every):
        layer.__class__ = _class_of(FusedLayer, type(layer))
        layer.fused, layer.position, layer.plan, layer.why = shared, position, None, ""
    base: Any = model.get_submodule(path.rpartition(".")[0])
    base.__class__, base.fused = _class_of(FusedModel, type(base)), shared


def _unfuse(base: nn.Module, layers: nn.ModuleList) -> None:
    for module in (base, *layers):
        if isinstance(module, FusedLayer | FusedModel):
            module.__class__ = type(module).__mro__[2]
            for name in ("fused", "position", "plan", "why"):
                module.__dict__.pop(name, None)


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
