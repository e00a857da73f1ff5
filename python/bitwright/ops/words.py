"""Matrices whose codes are still packed, as files have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt

from bitwright.ops.codes import unpack
from bitwright.spec import F32, I32, U8, U32, InputError, QTensor, Scheme, check_beside


class WordRows(Protocol):
    """A matrix of words that gives rows by a slice; they hold until it is asked again."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice, /) -> npt.NDArray[Any]: ...


@dataclass(frozen=True, eq=False)
class QWords:
    """A QTensor before its codes are unpacked, which `pack_linear` does not ask for.

    words: uint32 (n, ceil(columns bits / 32)), as `pack` makes them of codes (n, columns), an array
    or what reads one. The rest as in a QTensor; `unpacked` makes one of it.
    """

    words: U32 | WordRows
    columns: int
    scales: F32
    zeros: U8 | F32
    scheme: Scheme
    global_scale: float = 1.0
    steps: F32 | None = None
    order: I32 | None = None

    def __post_init__(self) -> None:
        width = -(-self.columns * self.scheme.bits // 32)
        rows = self.words.shape
        if len(rows) != 2 or rows[0] < 1 or rows[1] != width:
            raise InputError(
                f"[QWords] wanted words (n, {width}) for {self.columns} codes in a row in "
                f"{self.scheme.name}, got {rows}"
            )
        check_beside(self)

    @property
    def shape(self) -> tuple[int, int]:
        return self.words.shape[0], self.columns


def unpacked(q: QTensor | QWords) -> QTensor:
    """`q` with a byte for each code."""
    if isinstance(q, QTensor):
        return q
    codes = unpack(q.words[:], q.scheme.bits, q.columns)
    return QTensor(codes, q.scales, q.zeros, q.scheme, q.global_scale, q.steps, q.order)
