"""bitsandbytes checkpoints (quant_method "bitsandbytes"), 4 bits (nf4, fp4) and int8; read only.

4 bits: the matrix is flattened row by row and cut into blocks; below the module path P

    P.weight                               uint8 ((n k + 1) / 2, 1)   codes, the first in the high
                                           nibble
    P.weight.absmax                        fp32 (blocks,), or uint8 where nested
    P.weight.nested_absmax                 fp32 (blocks / 256,)
    P.weight.nested_quant_map              fp32 (256,)
    P.weight.quant_state.bitsandbytes__nf4 (or __fp4)   uint8, JSON: quant_type, blocksize, shape;
                                           nested: nested_blocksize, nested_offset
    w = level[code] * absmax[block]
    nested: absmax = nested_quant_map[absmax] * nested_absmax[block / 256] + nested_offset

Blocks that run over the end of a row are read as shorter groups: the largest number of columns that
divides row and block. `fp4` is the library's own table, here the grid bfp4. P.weight.quant_map
repeats the table and is not looked at; the library does not either.

int8 (load_in_8bit): P.weight int8 (n, k), P.SCB fp32 (n,); w = code * SCB / 127.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bitwright import schemes
from bitwright.files.checkpoint import fetch
from bitwright.spec import F32, InputError, QTensor, RefusedError, Scheme

METHOD = "bitsandbytes"
KINDS = {"nf4": "nf4", "fp4": "bfp4"}  # quant_type: grid
# Index of each of the library's fp4 codes among the levels of bfp4; it has +0 and -0.
RANKS = (7, 8, 13, 14, 11, 12, 9, 10, 7, 6, 1, 0, 3, 2, 5, 4)
ZERO = 7  # the code of 0 in both grids; a block of zeros has no scale
STATE = ".weight.quant_state.bitsandbytes__"
F32_TYPE, U8_TYPE = np.dtype(np.float32), np.dtype(np.uint8)
Array = npt.NDArray[Any]
Getter = Callable[[str], Array]


@dataclass(frozen=True)
class _State:
    """What the JSON of a 4-bit module says."""

    kind: str
    block: int
    shape: tuple[int, int]
    nested_block: int = 0
    offset: float = 0.0

    @property
    def columns(self) -> int:
        """Of a row that surely share a scale."""
        return math.gcd(self.block, self.shape[1])


def _kind(config: Mapping[str, Any]) -> str:
    kind = "int8" if config.get("load_in_8bit") else config.get("bnb_4bit_quant_type", "fp4")
    if kind not in (*KINDS, "int8"):
        raise RefusedError(f"[bitsandbytes] wanted bnb_4bit_quant_type nf4 or fp4, got {kind!r}")
    return str(kind)


def _state(name: str, get: Getter, kind: str) -> _State:
    key = f"{name}{STATE}{kind}"
    told = get(key).tobytes()
    try:
        said = json.loads(told)
        n, k = said["shape"]
        coarse, offset = said.get("nested_blocksize", 0), float(said.get("nested_offset", 0.0))
        state = _State(said["quant_type"], said["blocksize"], (n, k), coarse, offset)
        numbers = (state.block, n, k, coarse + 1)
        if any(type(x) is not int or x < 1 for x in numbers) or state.kind != kind:
            raise ValueError
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"[bitsandbytes] wanted quant_type {kind}, a blocksize and n, k as JSON in {key}, got "
            f"{told!r:.200}"
        ) from error
    return state


def scheme(name: str, config: Mapping[str, Any], get: Getter) -> Scheme:
    """The scheme of a module."""
    if _kind(config) == "int8":
        return schemes.parse("int8-channel-fp32")
    state = _state(name, get, _kind(config))
    return schemes.parse(f"{KINDS[state.kind]}-g{state.columns}-fp32")


def _absmax(name: str, get: Getter, state: _State, blocks: int) -> F32:
    at = f"{name}.weight"
    if not state.nested_block:
        plain: F32 = fetch(get, {f"{at}.absmax": (F32_TYPE, (blocks,))})[f"{at}.absmax"]
        return plain
    coarse = -(-blocks // state.nested_block)
    tensors = fetch(
        get,
        {
            f"{at}.absmax": (U8_TYPE, (blocks,)),
            f"{at}.nested_absmax": (F32_TYPE, (coarse,)),
            f"{at}.nested_quant_map": (F32_TYPE, (256,)),
        },
    )
    levels = tensors[f"{at}.nested_quant_map"][tensors[f"{at}.absmax"]]
    scales = np.repeat(tensors[f"{at}.nested_absmax"], state.nested_block)[:blocks]
    return np.asarray(levels * scales + np.float32(state.offset), np.float32)


def _read_int8(name: str, get: Getter) -> QTensor:
    n, k = shape(name, {f"{name}.weight": get(f"{name}.weight").shape}, get)
    tensors = fetch(
        get, {f"{name}.weight": (np.dtype(np.int8), (n, k)), f"{name}.SCB": (F32_TYPE, (n,))}
    )
    codes = tensors[f"{name}.weight"].view(np.uint8) ^ np.uint8(128)
    scales = np.asarray(tensors[f"{name}.SCB"] / np.float32(127), np.float32)[:, None]
    scales[scales == 0] = 1
    zeros = np.full((n, 1), 128, np.uint8)
    return QTensor(codes, scales, zeros, scheme(name, {"load_in_8bit": True}, get))


def read(name: str, get: Getter, config: Mapping[str, Any]) -> QTensor:
    """The linear `name` of a checkpoint whose tensors `get` gives."""
    if _kind(config) == "int8":
        return _read_int8(name, get)
    state = _state(name, get, _kind(config))
    (n, k), columns = state.shape, state.columns
    packed = fetch(get, {f"{name}.weight": (U8_TYPE, ((n * k + 1) // 2, 1))})[f"{name}.weight"]
    codes = np.stack([packed.ravel() >> 4, packed.ravel() & 15], 1).reshape(-1)[: n * k]
    if state.kind == "fp4":
        codes = np.array(RANKS, np.uint8)[codes]
    absmax = _absmax(name, get, state, -(-n * k // state.block))
    starts = np.arange(0, n * k, columns) // state.block
    scales, codes = absmax[starts].reshape(n, k // columns), codes.reshape(n, k)
    empty = scales == 0
    codes[np.repeat(empty, columns, 1)] = ZERO
    scales[empty] = 1
    zeros = np.zeros(scales.shape, np.uint8)
    return QTensor(codes, scales, zeros, scheme(name, config, get))


def stored(
    name: str,
    get: Getter,
    config: Mapping[str, Any],
    rows: Callable[[str], Any] | None = None,  # noqa: ARG001
) -> QTensor:
    """The same: its codes have another order in the file."""
    return read(name, get, config)


def quantized(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Module paths of the quantized linears among these tensor names."""
    end = ".SCB" if _kind(config) == "int8" else f"{STATE}{_kind(config)}"
    return [name.removesuffix(end) for name in names if name.endswith(end)]


def shape(name: str, shapes: Mapping[str, tuple[int, ...]], get: Getter) -> tuple[int, int]:
    """(n, k) of a quantized linear."""
    for kind in KINDS:
        if f"{name}{STATE}{kind}" in shapes:
            return _state(name, get, kind).shape
    stored = shapes[f"{name}.weight"]
    if len(stored) != 2:
        raise InputError(f"[bitsandbytes] wanted {name}.weight in two dimensions, got {stored}")
    return (stored[0], stored[1])
