"""A transformers model of which only the parts in use are real.

The model stands on the meta device (`hollow`) and knows the name and shape of every weight.
`fill(prefix)` reads the weights under a module path, `empty` drops them. Blocks run outside the
model's own loop (`walk`):

    embed(ids)      hidden states (B, L, h) before block 0; notes each block's masks and positions
    forward_block   one real block with what was noted for this (B, L)
    logits(hidden)  final norm, head and soft caps by the model's own code

so embedding scales, projections and masks per layer type need no knowledge here. What a block gets
besides hidden states must not depend on the tokens; that is compared at every `embed`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedConfig

from bitwright.calib import attention as door
from bitwright.calib import device as devices
from bitwright.calib import hollow
from bitwright.calib.walk import BlockCall, Walk, first, same
from bitwright.spec import InputError, RefusedError

ForwardDtype = Literal["float32", "bfloat16"]
Read = Callable[[str], npt.NDArray[Any]]


def forward_dtype(device: torch.device = devices.CPU) -> ForwardDtype:
    """bfloat16 where the device multiplies it faster than float32, of a CPU by maker and
    instruction set: with AMX-BF16, or with AVX512-BF16 on another's than Intel's, whose pairs of
    bf16 run at half the rate of float32 multiply-adds (torch's linear at 146 GFLOP/s against 238 on
    Sapphire Rapids)."""
    if device.type != "cpu":
        return "bfloat16" if devices.multiplies_bf16(device) else "float32"
    flags: set[str] = set()
    maker = ""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "vendor_id":
                maker = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
                break
    if not flags:
        known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        flags = {name for name in ("avx512_bf16", "amx_bf16") if known.get(name)}
    pairs = "avx512_bf16" in flags and maker != "GenuineIntel"
    return "bfloat16" if pairs or "amx_bf16" in flags else "float32"


def as_tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    """A float array (ml_dtypes' bf16 included) as a tensor, on its memory where it is writable."""
    array = np.ascontiguousarray(array)
    array = array if array.flags.writeable else array.copy()
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def longest_window(skeleton: Skeleton) -> int:
    """Tokens that the model takes at most, 0 where its config does not say."""
    config = skeleton.model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", 0) or 0)


def value_rows(skeleton: Skeleton, rows: int) -> int:
    """How many of the rows of a fused q, k, v projection are v's: the last ones."""
    config = skeleton.model.config.get_text_config()
    heads = int(config.num_attention_heads)
    kv = int(getattr(config, "num_key_value_heads", None) or heads)
    return rows * kv // (heads + 2 * kv)


class Skeleton:
    """The model of a checkpoint, empty until filled.

    folder: where config.json lies, or a config. read: dense name -> float array. names: the dense
    names there are (None: as the model spells them); given as a mapping to shapes (or things with a
    shape), these are checked here, otherwise when tensors are read. InputError names the tensor
    that is missing or misshapen, what was wanted and what came. device: where weights are put and
    blocks run.
    """

    def __init__(
        self,
        folder: Path | PreTrainedConfig,
        read: Read,
        names: Iterable[str] | None,
        dtype: ForwardDtype = "float32",
        attention: str = door.NAME,
        device: torch.device = devices.CPU,
    ) -> None:
        door.register()
        self._read = read
        self.device = device
        self.forward = dtype
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.model = hollow.build(hollow.read_config(folder), self.dtype, attention)
        hollow.move_buffers(self.model, device)
        self.block_path, self.blocks = hollow.find_blocks(self.model)
        self.count = len(self.blocks)
        self.slots = hollow.find_slots(self.model)
        spelled = hollow.own_names(self.model, self.slots) if names is None else names
        self.sources = hollow.find_sources(self.model, self.slots, spelled)
        self.embeddings = self._path(self.model.get_input_embeddings)
        self.head = self._path(self.model.get_output_embeddings)
        self._calls: dict[tuple[int, int], list[BlockCall]] = {}
        self._tuples = False

    def _path(self, get: Callable[[], nn.Module | None]) -> str:
        module = get()
        return next((name for name, m in self.model.named_modules() if m is module), "")

    def path(self, i: int) -> str:
        """Module path of block i."""
        return f"{self.block_path}.{i}"

    def under(self, prefix: str) -> list[str]:
        """Names of the tensors under a module path; all of them for ""."""
        return [n for n in self.slots if not prefix or n == prefix or n.startswith(f"{prefix}.")]

    def fill(self, prefix: str) -> None:
        """Read the weights under `prefix` that are not there yet."""
        for name in self.under(prefix):
            self._fill(name)

    def empty(self, prefix: str = "") -> None:
        """Drop the weights under `prefix`; all of them for ""."""
        for name in self.under(prefix):
            slot = self.slots[name]
            slot.table[slot.key] = slot.meta

    def get(self, name: str) -> torch.Tensor:
        """The weight `name` as it is now: real where it was filled or put."""
        slot = self.slots[name]
        tensor: torch.Tensor = slot.table[slot.key]
        return tensor

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Use `tensor` as the weight `name`, in the dtype of the forward, until it is emptied."""
        slot = self.slots[name]
        hollow.check_shape(name, slot.meta.shape, tensor.shape)
        tensor = tensor.to(self.device, slot.meta.dtype).contiguous()
        is_parameter = isinstance(slot.meta, nn.Parameter)
        slot.table[slot.key] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor

    @contextmanager
    def block(self, i: int) -> Iterator[nn.Module]:
        """Block i with its weights, for as long as the `with` lasts."""
        try:
            self.fill(self.path(i))
            yield self.blocks[i]
        finally:
            self.empty(self.path(i))

    @torch.inference_mode()
    def embed(self, ids: npt.NDArray[np.int64] | torch.Tensor) -> torch.Tensor:
        """Hidden states (B, L, h) before the first block of token ids (B, L).

        Fills what lies outside the blocks, except an untied head, and leaves it filled."""
        self._fill_outside(leave=self.head)
        tokens = torch.as_tensor(ids)
        try:
            self._look_at(tokens)
            walk = self._walk(None, input_ids=tokens.to(self.device))
        except IndexError as error:
            config = self.model.config.get_text_config()
            raise InputError(
                f"[skeleton] wanted ids below {config.vocab_size} in windows of at most "
                f"{config.max_position_embeddings}, got ids up to {int(tokens.max())} in windows "
                f"of {tokens.shape[1]}"
            ) from error
        self._remember((tokens.shape[0], tokens.shape[1]), walk.calls)
        return walk.hidden

    @torch.inference_mode()
    def forward_block(self, i: int, hidden: torch.Tensor) -> torch.Tensor:
        """Block i, which must be filled, on hidden states (B, L, h)."""
        call = self.call(i, hidden)
        return first(self.blocks[i](hidden.to(self.device), *call.args, **call.kwargs))

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (B, L, vocabulary) of the last block's output: final norm and head.

        Positions are independent: a slice along L gives the same rows. Fills what lies outside the
        blocks, except untied input embeddings, and leaves it filled."""
        self._fill_outside(leave=self.embeddings)
        width = self.slots[f"{self.embeddings}.weight"].meta.shape[1]
        hidden = hidden.to(self.device)
        blank = hidden.new_zeros((*hidden.shape[:2], width))
        return self._walk(hidden.contiguous(), inputs_embeds=blank).logits

    def call(self, i: int, hidden: torch.Tensor) -> BlockCall:
        """What block i gets besides hidden states of this shape."""
        shape = (hidden.shape[0], hidden.shape[1])
        if shape not in self._calls:
            self.embed(torch.zeros(shape, dtype=torch.int64))
        return self._calls[shape][i]

    def _fill(self, name: str) -> None:
        slot = self.slots[name]
        if not slot.table[slot.key].is_meta:
            return
        source = self.sources[name]
        twins = (self.slots[n] for n, s in self.sources.items() if s == source and n != name)
        real = next((t.table[t.key] for t in twins if not t.table[t.key].is_meta), None)
        self.put(name, self._load(source) if real is None else real)

    def _load(self, source: str) -> torch.Tensor:
        array = self._read(source)
        if array.dtype.kind not in "fV" or array.dtype.itemsize == 1:
            raise InputError(f"[skeleton] wanted floats in tensor {source}, got {array.dtype}")
        tensor = as_tensor(array)
        if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
            raise InputError(f"[skeleton] wanted finite weights, got NaN or infinity in {source}")
        return tensor

    def _look_at(self, tokens: torch.Tensor) -> None:
        """IndexError for ids that no table has: on a GPU looking them up would end the process."""
        rows = self.slots[f"{self.embeddings}.weight"].meta.shape[0]
        longest = longest_window(self) or tokens.shape[1]
        outside = bool(((tokens < 0) | (tokens >= rows)).any()) or tokens.shape[1] > longest
        if self.device.type != "cpu" and outside:
            raise IndexError

    def _fill_outside(self, leave: str) -> None:
        """Fill what lies in no block and not in the module `leave`."""
        skip = {*self.under(self.block_path), *(self.under(leave) if leave else ())}
        for name in self.slots:
            if name not in skip:
                self._fill(name)

    def _walk(self, last: torch.Tensor | None, **inputs: Any) -> Walk:
        walk = Walk(self.blocks, last, self._tuples).run(self.model, self.block_path, inputs)
        if not walk.unpacked:
            return walk
        self._tuples = True
        return Walk(self.blocks, last, self._tuples).run(self.model, self.block_path, inputs)

    def _remember(self, shape: tuple[int, int], calls: list[BlockCall]) -> None:
        known = self._calls.setdefault(shape, calls)
        for i, (old, new) in enumerate(zip(known, calls, strict=True)):
            if not same((old.args, old.kwargs), (new.args, new.kwargs)):
                raise RefusedError(
                    "[skeleton] wanted blocks whose arguments are the same for all tokens, got "
                    f"{self.path(i)} of {type(self.model).__name__} with arguments that differ"
                )
