"""Decoder blocks of the Llama kind on packed matrices: all of them in one call.

    x += o(attention(q, k, v of rms(x)));  x += down(silu(gate) up),  gate, up of rms(x)

Floats inside a block, the result of each rounded to x's dtype; csrc/ops.h is the contract. Keys
and values stay the caller's: arrays (batch, kv_heads, room, width) that the call writes to, behind
the tokens they have. Results do not depend on how many tokens come in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from bitwright import _core
from bitwright.ops.arrays import BFLOAT16, in_place, matrix, vector
from bitwright.ops.linear import FLOAT32, Activations, Mode, PackedMatrix
from bitwright.spec import F32, U8, InputError

NO_MASK: U8 = np.zeros((0, 0), np.uint8)


@dataclass(frozen=True, eq=False)
class DecoderBlock:
    """matrices: q, k, v, o, gate, up, down. gains: of the two norms, then of the norms of q's and
    k's heads where there are any. biases: of all matrices one behind the other, or of none (0).
    scale: of the scores. rotary: whether q and k are turned by their positions.
    """

    matrices: tuple[PackedMatrix, ...]
    gains: F32
    biases: F32
    heads: int
    kv_heads: int
    epsilon: float
    scale: float
    rotary: bool = True
    mode: Mode = "exact"
    activations: Activations = "group"
    core: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        settings = _core.BlockSettings(
            self.heads,
            self.kv_heads,
            self.epsilon,
            self.scale,
            self.rotary,
            self.mode == "fast",
            self.activations == "token",
        )
        gains, biases = (vector("blocks", x, np.float32) for x in (self.gains, self.biases))
        object.__setattr__(self, "gains", gains)
        object.__setattr__(self, "biases", biases)
        cores = [one.core for one in self.matrices]
        object.__setattr__(self, "core", _core.Block(cores, gains, biases, settings))


class KeyValues:
    """Keys and values of one block, (batch, kv_heads, room, width) float32 or bfloat16, contiguous;
    the memory is used, not copied."""

    def __init__(self, keys: npt.NDArray[Any], values: npt.NDArray[Any]) -> None:
        if keys.ndim != 4 or keys.dtype not in (FLOAT32, BFLOAT16):
            raise InputError(
                "[blocks] wanted keys (batch, heads, room, width) of float32 or bfloat16, got "
                f"{keys.ndim}-D of {keys.dtype}"
            )
        arrays = [in_place("blocks", x, keys.dtype, keys.shape) for x in (keys, values)]
        rows = [x.reshape(-1, keys.shape[3]) for x in arrays]
        wide = keys.dtype == FLOAT32
        self.core: Any = (
            _core.KeyValuesF32(*rows)
            if wide
            else _core.KeyValuesU16(*(x.view(np.uint16) for x in rows))
        )
        self.dtype = keys.dtype


def blocks(
    x: npt.NDArray[Any],
    through: Sequence[DecoderBlock],
    cos: npt.NDArray[Any],
    sin: npt.NDArray[Any],
    stores: Sequence[KeyValues],
    *,
    batch: int = 1,
    past: int = 0,
    mask: U8 = NO_MASK,
) -> npt.NDArray[Any]:
    """What comes out of the blocks for x (batch * t, hidden), float32 or bfloat16, the rows of one
    sequence behind those of another.

    cos, sin: (t, width), or (batch * t, width), of x's dtype. past: tokens that the stores hold
    already. mask: (batch * t, past + t), 0 where a token does not see a key; none: it sees those up
    to its own.
    """
    if x.dtype not in (FLOAT32, BFLOAT16) or any(one.dtype != x.dtype for one in stores):
        raise InputError(
            f"[blocks] wanted x of float32 or bfloat16 and stores of its dtype, got {x.dtype} and "
            f"{sorted({str(one.dtype) for one in stores})}"
        )
    x, cos, sin = (matrix("blocks", one, x.dtype) for one in (x, cos, sin))
    mask = matrix("blocks", mask, np.uint8)
    y = np.empty_like(x)
    cores = [one.core for one in through], [one.core for one in stores]
    if x.dtype == FLOAT32:
        _core.blocks_f32(x, cores[0], cos, sin, mask, cores[1], batch, past, y)
    else:
        words = [one.view(np.uint16) for one in (x, cos, sin, y)]
        _core.blocks_u16(words[0], cores[0], *words[1:3], mask, cores[1], batch, past, words[3])
    return y


def head(X: npt.NDArray[Any], W: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """X (t, k), float32 or bfloat16, times W^T, W (n, k) bfloat16: (t, n) of X's dtype. For a few
    tokens: W is read once, and each row of it multiplied by one token after the other."""
    if X.dtype not in (FLOAT32, BFLOAT16):
        raise InputError(f"[head] wanted X of float32 or bfloat16, got {X.dtype}")
    X, W = matrix("head", X, X.dtype), matrix("head", W, BFLOAT16)
    y = np.empty((len(X), len(W)), X.dtype)
    if X.dtype == FLOAT32:
        _core.head_f32(X, W.view(np.uint16), y)
    else:
        _core.head_u16(*(one.view(np.uint16) for one in (X, W, y)))
    return y
