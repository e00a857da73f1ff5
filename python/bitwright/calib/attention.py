"""One attention function with a door in it, so that v can wait where q and k are already known.

Registered under one name in transformers' AttentionInterface *and* AttentionMaskInterface: a name
known to the first alone gets no mask, without a word. It is sdpa with sdpa's mask, except where a
model soft-caps its scores (`attn_logit_softcapping`, Gemma 2): sdpa cannot, so the model's own
eager function runs with eager's mask. Probabilities are not returned: frames would hold them.

Whoever holds the door (`watching`) sees each call before the probabilities are formed and gives
back the `value` to use.

`mix` forms what v's rows are really multiplied with. Head h of query q puts out W_v sum_t a_qt x_t,
so for the rows of a KV head the input is the mixed y = sum_t a_qt x_t, over the queries and the
query heads that share it (docs/solver.md 8). A sample of the queries is enough.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

NAME = "bitwright"


@dataclass(frozen=True, eq=False)
class Call:
    """One attention call: query (B, heads, L, d), key and value (B, KV heads, L, d), a mask or None
    (then causal), and the options of the model (scaling, softcap, sliding_window)."""

    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    options: Mapping[str, Any]


Watcher = Callable[[Call], torch.Tensor]


class _Door(threading.local):
    watcher: Watcher | None = None


_door = _Door()


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Every attention call of this thread gets its value from `watcher` while the `with` lasts."""
    before, _door.watcher = _door.watcher, watcher
    try:
        yield
    finally:
        _door.watcher = before


def register() -> str:
    """Make NAME known to transformers (any number of times) and return it."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME


def mix(call: Call, x: torch.Tensor, every: int, most: int) -> torch.Tensor | None:
    """Inputs x (B, L, k) of v mixed by the attention of every `every`th query: (pools, rows, k),
    rows = B * heads per pool * queries. A pool is one KV head, or as many neighbours as leave no
    more than `most` pools. None where the call has what this does not know (attention sinks).
    """
    unknown = {"s_aux", "position_bias"}
    if any(call.options.get(name) is not None for name in unknown):
        return None
    if call.key.shape[2] != call.query.shape[2]:
        return None
    batch, heads, length, width = call.query.shape
    kv = call.key.shape[1]
    first, step = (every - 1, every) if length >= every else (0, 1)
    at = torch.arange(first, length, step, device=x.device)
    rows = heads // kv * len(at)
    mixed = x.new_empty((kv, batch, rows, x.shape[-1]))
    for b in range(batch):  # a window at a time: scores are (heads, queries, L) in float32
        scores = call.query[b][:, at].reshape(kv, rows, width) @ call.key[b].transpose(1, 2)
        share = _shares(call, b, at, scores.view(heads, len(at), length)).to(x.dtype)
        mixed[:, b] = share.view(kv, rows, length) @ x[b]
    pools = max(n for n in range(1, min(kv, most) + 1) if kv % n == 0)
    return mixed.view(pools, -1, x.shape[-1])


def _shares(call: Call, b: int, at: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Probabilities (heads, queries, L) of window b from products of its queries and keys."""
    scaling, cap = call.options.get("scaling"), call.options.get("softcap")
    scores = scores.float()
    scores *= call.query.shape[-1] ** -0.5 if scaling is None else scaling
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if call.mask is None:
        scores.masked_fill_(
            torch.arange(scores.shape[-1], device=at.device) > at[:, None], -torch.inf
        )
    else:
        mask = call.mask[b if len(call.mask) > 1 else 0][:, at, : scores.shape[-1]]
        if mask.dtype == torch.bool:
            scores.masked_fill_(~mask, -torch.inf)
        else:
            scores += mask
    return scores.softmax(-1)


def _mask(*args: Any, config: Any = None, **kwargs: Any) -> Any:
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return (eager_mask if capped else sdpa_mask)(*args, config=config, **kwargs)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    if _door.watcher is not None:
        value = _door.watcher(Call(module, query, key, value, attention_mask, options))
    if options.get("softcap") is None:
        forward = sdpa_attention_forward
    else:
        forward = sys.modules[type(module).__module__].eager_attention_forward
    out: torch.Tensor = forward(module, query, key, value, attention_mask, **options)[0]
    return out, None
