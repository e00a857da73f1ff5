"""What the machine can do at most: multiply-adds in registers, and reading."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bitwright import _core
from bitwright.ops.arrays import matrix
from bitwright.spec import F32, F64, InputError

CHAINS = 384  # numbers of float32 that run side by side; of float64 half as many

U64 = npt.NDArray[np.uint64]


def chain(x: F32 | F64, rounds: int, a: float, b: float, *, pairs: bool = False) -> F32 | F64:
    """x (tasks, a multiple of CHAINS; of float64 of half as many) after `rounds` times x = x a + b.
    pairs: x = x + a b + a b by products of bf16 pairs, refused where the level has none."""
    wide = np.asarray(x).dtype == np.float64 and not pairs
    y: npt.NDArray[Any] = matrix("chain", x, np.float64 if wide else np.float32).copy()
    if rounds < 0:
        raise InputError(f"[chain] wanted rounds from 0 on, got {rounds}")
    if pairs:
        _core.chain_bf16(rounds, a, b, y)
    elif wide:
        _core.chain_f64(rounds, a, b, y)
    else:
        _core.chain_f32(rounds, a, b, y)
    return y


def dot_chain(x: npt.NDArray[np.int32], rounds: int, code: int, byte: int) -> npt.NDArray[np.int32]:
    """x (tasks, a multiple of CHAINS) after `rounds` times x += four products code * byte."""
    y: npt.NDArray[np.int32] = matrix("dot_chain", x, np.int32).copy()
    if rounds < 0 or not 0 <= code <= 15 or not -127 <= byte <= 127:
        raise InputError(
            "[dot_chain] wanted rounds from 0 on, a code of 0 to 15 and a byte of -127 to 127, got "
            f"{rounds}, {code} and {byte}"
        )
    _core.dot_chain(rounds, code, byte, y)
    return y


def word_sum(x: U64) -> U64:
    """Sums (r,) of the words of each row of x uint64 (r, count), modulo 2^64: one read of x."""
    x = matrix("word_sum", x, np.uint64)
    sums = np.empty(len(x), np.uint64)
    _core.word_sum(x, sums)
    return sums
