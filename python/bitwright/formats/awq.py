"""AWQ checkpoints (quant_method "awq", version "gemm"), 4 bits; read only.

Below the module path P of a linear (n, k), groups of g columns, G = k / g of them:

    P.qweight  int32 (k, n / 8)    codes along n, eight in a word
    P.qzeros   int32 (G, n / 8)    zero points, packed alike; 8 everywhere where zero_point is false
    P.scales   fp16 (G, n)
    w[i, j] = (code[i, j] - zero[i, j // g]) * scales[j // g, i]

Bits 4 i .. 4 i + 3 of word c belong to row 8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i]. The scales of the
activations are folded into the weights. Other versions (gemv, gemv_fast, llm-awq) have other
layouts and are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from bitwright import ops, schemes
from bitwright.files.checkpoint import fetch
from bitwright.spec import InputError, QTensor, RefusedError, Scheme

METHOD = "awq"
BITS = 4
IN_A_WORD = 8
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of natural row j in its word of eight nibbles
Array = npt.NDArray[Any]
Getter = Callable[[str], Array]


def scheme(
    name: str,  # noqa: ARG001
    config: Mapping[str, Any],
    get: Getter | None = None,  # noqa: ARG001
) -> Scheme:
    """The scheme of a module: the one that the config gives all of them."""
    bits, group = config.get("bits"), config.get("group_size")
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version != "gemm":
        raise RefusedError(f"[awq] wanted version gemm, got {version!r}")
    if bits != BITS or not isinstance(group, int):
        raise RefusedError(f"[awq] wanted 4 bits and a group size, got {bits} and {group}")
    where = f"g{group}" if group > 0 else "channel"
    return schemes.parse(f"int4-{where}{'-asym' if config.get('zero_point', True) else ''}")


def _rows(words: Array) -> Array:
    """Codes (r, n) of words (r, n / 8)."""
    packed = np.ascontiguousarray(words).view(np.uint32)
    codes = ops.unpack(packed, BITS, packed.shape[1] * IN_A_WORD)
    natural: Array = codes.reshape(len(codes), -1, IN_A_WORD)[:, :, PLACES]
    return natural.reshape(codes.shape)


def read(name: str, get: Getter, config: Mapping[str, Any]) -> QTensor:
    """The linear `name` of a checkpoint whose tensors `get` gives."""
    wanted, words, scales = scheme(name, config), get(f"{name}.qweight"), get(f"{name}.scales")
    if words.ndim != 2 or not words.size or scales.dtype not in (np.float16, ops.BFLOAT16):
        raise InputError(
            f"[awq] wanted {name}.qweight as k x n / 8 words and {name}.scales in 16 bits, got "
            f"{words.shape} and {scales.dtype}"
        )
    k, n = words.shape[0], words.shape[1] * IN_A_WORD
    if k % wanted.columns(k):
        raise InputError(
            f"[awq] wanted groups of {wanted.group} that divide the rows of {name}, got {k} columns"
        )
    groups, int32 = wanted.groups(k), np.dtype(np.int32)
    tensors = fetch(
        get,
        {
            f"{name}.qweight": (int32, (k, n // IN_A_WORD)),
            f"{name}.qzeros": (int32, (groups, n // IN_A_WORD)),
            f"{name}.scales": (scales.dtype, (groups, n)),
        },
    )
    codes, zeros, factors = (
        np.ascontiguousarray(array.T)
        for array in (
            _rows(tensors[f"{name}.qweight"]),
            _rows(tensors[f"{name}.qzeros"]),
            scales.astype(np.float32),
        )
    )
    middle = 1 << (BITS - 1)
    if wanted.symmetric and (zeros != middle).any():
        raise InputError(
            f"[awq] {name}: its config says symmetric, but not all of its zero points are {middle}"
        )
    return QTensor(codes, factors, zeros, wanted)


def stored(
    name: str,
    get: Getter,
    config: Mapping[str, Any],
    rows: Callable[[str], Any] | None = None,  # noqa: ARG001
) -> QTensor:
    """The same: its codes have another order in the file."""
    return read(name, get, config)


def quantized(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:  # noqa: ARG001
    """Module paths of the quantized linears among these tensor names."""
    return [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]


def shape(
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    get: Getter,  # noqa: ARG001
) -> tuple[int, int]:
    """(n, k) of a quantized linear."""
    k, words = shapes[f"{name}.qweight"]
    return words * IN_A_WORD, k
