"""Layers of transformers' DynamicCache with room for tokens to come.

A plain layer copies all its keys and values for every token. These keep them in buffers that grow
by half, and are plain layers to all who ask: keys and values are views of what is there, and what
is set (by a beam search, a crop) is taken over. What was handed out keeps its numbers, since the
buffers are written behind their end alone, and anew after a tensor was set.

`roomy(cache, i)` puts one in place of a plain layer. A sliding window's layer is one until the
window is full; then it goes on as transformers has it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from bitwright import ops

CHUNK = 256  # tokens


class _Roomy(DynamicLayer):  # type: ignore[no-untyped-call]
    """What both kinds do. buffers: keys and values (batch, heads, room, width), the first `length`
    of them in use; or None, then `loose` has them as they were set."""

    def __init__(self, **settings: Any) -> None:
        self.buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self.loose: list[torch.Tensor | None] = [None, None]
        self.length = 0
        self._store: ops.KeyValues | None = None
        super().__init__(**settings)  # type: ignore[no-untyped-call]

    def _get(self, i: int) -> torch.Tensor | None:
        return self.loose[i] if self.buffers is None else self.buffers[i][:, :, : self.length]

    def _set(self, i: int, value: torch.Tensor | None) -> None:
        self.loose = [self._get(0), self._get(1)]
        self.loose[i], self.buffers, self._store = value, None, None

    @property
    def keys(self) -> torch.Tensor | None:
        return self._get(0)

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        self._set(0, value)

    @property
    def values(self) -> torch.Tensor | None:
        return self._get(1)

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        self._set(1, value)

    @property
    def store(self) -> ops.KeyValues:
        """The buffers, as the op takes them."""
        if self._store is None and self.buffers is not None:
            self._store = ops.KeyValues(*(ops.as_numpy(one) for one in self.buffers))
        return self._store  # type: ignore[return-value]

    def reserve(self, batch: int, heads: int, tokens: int, width: int, dtype: torch.dtype) -> bool:
        """Room for so many more tokens; False where what is there is of another kind."""
        here = self.buffers
        if here is not None and self.length + tokens <= here[0].shape[2]:
            return here[0].dtype == dtype and here[0].shape[0] == batch
        past, shape = self._past(), (batch, heads, width)
        for one in past:
            if (*one.shape[:2], one.shape[3]) != shape or one.dtype != dtype:
                return False
        length = past[0].shape[2] if past else 0
        room = max(length + tokens, length * 3 // 2) + CHUNK - 1
        room -= room % CHUNK
        made = [torch.empty(batch, heads, room, width, dtype=dtype) for _ in range(2)]
        for one, old in zip(made, past, strict=False):
            one[:, :, :length] = old
        self.buffers, self.loose, self._store = (made[0], made[1]), [None, None], None
        self.length, self.device, self.is_initialized = length, made[0].device, True
        return True

    def _past(self) -> list[torch.Tensor]:
        both = [self._get(0), self._get(1)]
        return [one for one in both if one is not None and one.numel()]

    def grown(self, tokens: int) -> None:
        """So many tokens have been written behind the last."""
        self.length += tokens

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        batch, heads, tokens, width = key_states.shape
        wanted = value_states.shape == key_states.shape and not key_states.requires_grad
        if not wanted or not self.reserve(batch, heads, tokens, width, key_states.dtype):
            return False
        if self.buffers is not None:
            for one, new in zip(self.buffers, (key_states, value_states), strict=True):
                one[:, :, self.length : self.length + tokens] = new
        self.grown(tokens)
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_store": None}


class RoomyLayer(_Roomy):  # type: ignore[no-untyped-call]
    """Of full attention."""

    def get_seq_length(self) -> int:
        """Tokens that it has."""
        return super().get_seq_length() if self.buffers is None else self.length

    def room_left(self, tokens: int) -> bool:  # noqa: ARG002
        """Whether so many more tokens see all before them."""
        return True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As a plain layer's."""
        if self._append(key_states, value_states):
            return self.keys, self.values  # type: ignore[return-value]
        return super().update(key_states, value_states, *args, **kwargs)


class RoomySlidingLayer(_Roomy, DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """Of a sliding window."""

    def room_left(self, tokens: int) -> bool:
        """Whether so many more tokens see all before them."""
        return not self.record_past and self.cumulative_length + tokens < self.sliding_window

    def grown(self, tokens: int) -> None:
        """So many tokens have been written behind the last."""
        super().grown(tokens)
        self.cumulative_length += tokens

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As a plain layer's."""
        if self.room_left(key_states.shape[-2]) and self._append(key_states, value_states):
            return self.keys, self.values  # type: ignore[return-value]
        return DynamicSlidingWindowLayer.update(self, key_states, value_states, *args, **kwargs)


Roomy = RoomyLayer | RoomySlidingLayer


def roomy(cache: Any, index: int) -> Roomy | None:
    """Layer `index` of a cache, made roomy; None where it is not transformers' own kind."""
    if type(cache) is not DynamicCache or cache.offloading:
        return None
    while len(cache.layers) <= index:
        if cache.layer_class_to_replicate is not DynamicLayer:
            return None
        cache.layers.append(DynamicLayer())  # type: ignore[no-untyped-call]
    layer = cache.layers[index]
    if isinstance(layer, RoomyLayer | RoomySlidingLayer):
        return layer
    made: Roomy
    if type(layer) is DynamicLayer:
        made = RoomyLayer()
    elif type(layer) is DynamicSlidingWindowLayer:
        made = RoomySlidingLayer(sliding_window=layer.sliding_window)
    else:
        return None
    for name, value in vars(layer).items():
        setattr(made, name, value)
    cache.layers[index] = made
    return made
