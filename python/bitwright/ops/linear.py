"""y = X W^T on quantized weights: packing into the panels that the kernels read, and the product.

Panels (csrc/kernels/packed.h) are the same bytes at every instruction set. Codes take 2, 3, 4 or 8
bits, scales 16 where the scheme's are bf16 or fp16 (powers of two are bf16 as well), else 32.

exact: W is dequantized in registers, float32 sums along k in order; equal to `qlinear` bit for bit.
fast: x = d q + e with int8 q and |e| <= d / 2, d = largest |x| / 127 of the token's columns that
share a weight scale (32 at most), or of the whole token; so that, W dequantized,
|y - y_exact| <= sum_j |w_j| d_j / 2 and rounding. Levels of a table are multiples of the smallest
positive one (fp4) or are rounded to multiples of the largest / 127 (nf4: 0.004 scale more per
weight).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from bitwright import _core
from bitwright.ops.arrays import BFLOAT16, core_grid, matrix, zeros_in, zeros_out
from bitwright.ops.threads import threads
from bitwright.ops.words import QWords
from bitwright.spec import F32, U8, InputError, QTensor, RefusedError, Scheme

PANEL_ROWS = 16
FLOAT32: np.dtype[Any] = np.dtype(np.float32)
LINE = 64  # bytes that panels are aligned to
PIECE = 1 << 20  # bytes of words that a thread packs at a time
Mode = Literal["exact", "fast"]
Activations = Literal["group", "token"]


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A quantized (n, k) matrix in panels of 16 rows.

    panels: uint8, of `panel_shape`, contiguous; the memory is used, not copied. global_scale,
    steps: as in QTensor, for `unpack_linear`.
    """

    panels: U8
    scheme: Scheme
    shape: tuple[int, int]
    global_scale: float = 1.0
    steps: F32 | None = None
    layout: Any = field(init=False, repr=False)
    core: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        want = self.panel_shape(self.scheme, self.shape)
        p = self.panels
        if p.dtype != np.uint8 or p.shape != want or not p.flags.c_contiguous:
            raise InputError(
                f"[PackedMatrix] wanted contiguous panels uint8 {want} for {self.shape} in "
                f"{self.scheme.name}, got {p.ndim}-D of {p.dtype} {p.shape}"
            )
        p, layout = p.ravel().reshape(want), _layout(self.scheme, self.shape[1])
        object.__setattr__(self, "panels", p)
        object.__setattr__(self, "layout", layout)
        object.__setattr__(self, "core", _core.Packed(p, self.shape[0], layout))

    @staticmethod
    def panel_shape(scheme: Scheme, shape: tuple[int, int]) -> tuple[int, int]:
        """Panels and bytes of each for an (n, k) matrix."""
        n, k = shape
        return -(-n // PANEL_ROWS), _layout(scheme, k).bytes

    @classmethod
    def empty(
        cls,
        scheme: Scheme,
        shape: tuple[int, int],
        global_scale: float = 1.0,
        steps: F32 | None = None,
    ) -> PackedMatrix:
        """Panels on cache lines, for `pack_linear` to fill."""
        panels, size = cls.panel_shape(scheme, shape)
        memory = np.empty(panels * size + LINE, np.uint8)
        first = -memory.ctypes.data % LINE
        aligned = memory[first : first + panels * size].reshape(panels, size)
        return cls(aligned, scheme, shape, global_scale, steps)


@lru_cache(maxsize=256)
def _layout(scheme: Scheme, k: int) -> Any:
    if len(scheme.grid.values) > 16 and not scheme.grid.uniform:
        raise RefusedError(f"[linear] wanted a table of at most 16 levels, got {scheme.grid.name}")
    words = "fp32" if scheme.block or scheme.scale == "e4m3" else scheme.scale
    words = "bf16" if words == "e8m0" else words
    return _core.PanelLayout(
        grid=core_grid(scheme),
        k=k,
        group=scheme.columns(k),
        symmetric=scheme.symmetric,
        scale=words,
    )


def pack_linear(
    q: QTensor | QWords, into: PackedMatrix | None = None, row: int = 0
) -> PackedMatrix:
    """`q` in panels; or with `into`, its rows from `row` on, so that a matrix is packed a few rows
    at a time. row, and the rows of q unless they are the last, are multiples of 16."""
    if into is None:
        into = PackedMatrix.empty(q.scheme, q.shape, q.global_scale, q.steps)
    n, k = q.shape
    end = row + n
    whole = row % PANEL_ROWS == 0 and (n % PANEL_ROWS == 0 or end == into.shape[0])
    if not whole or not 0 <= row <= end <= into.shape[0] or k != into.shape[1]:
        raise InputError(
            f"[pack_linear] wanted rows of {into.shape} from a multiple of 16 on, got {q.shape} at "
            f"{row}"
        )
    if q.scheme != into.scheme:
        raise InputError(f"[pack_linear] wanted rows in {into.scheme.name}, got {q.scheme.name}")
    step = _rows_at_a_time(q)
    for first in range(0, n, step):
        rows = slice(first, min(first + step, n))
        scales = matrix("pack_linear", q.scales[rows], np.float32)
        told = scales, zeros_in("pack_linear", q.zeros[rows], q.scheme), q.scheme.bits, into.layout
        panels = into.panels[(row + first) // PANEL_ROWS : -(-(row + rows.stop) // PANEL_ROWS)]
        if isinstance(q, QWords):
            _core.pack_linear_u32(matrix("pack_linear", q.words[rows], np.uint32), *told, panels)
        else:
            _core.pack_linear(matrix("pack_linear", q.codes[rows], np.uint8), *told, panels)
    return into


def _rows_at_a_time(q: QTensor | QWords) -> int:
    """All rows of codes in memory; of words so many that they stay in the caches they are read to,
    for every thread."""
    if isinstance(q, QTensor):
        return q.shape[0]
    panel = PANEL_ROWS * q.words.shape[1] * 4
    panels: int = max(threads() * PIECE // panel, 1)
    return panels * PANEL_ROWS


def unpack_linear(packed: PackedMatrix) -> QTensor:
    """The matrix that was packed."""
    codes = np.empty(packed.shape, np.uint8)
    scales = np.empty((packed.shape[0], packed.scheme.groups(packed.shape[1])), np.float32)
    zeros = np.empty(scales.shape, np.float32)
    _core.unpack_linear(packed.panels, packed.layout, codes, scales, zeros)
    kept = zeros_out(zeros, packed.scheme)
    return QTensor(codes, scales, kept, packed.scheme, packed.global_scale, packed.steps)


@overload
def linear(
    X: npt.NDArray[Any],
    weights: PackedMatrix,
    *,
    mode: Mode = ...,
    activations: Activations = ...,
    dtype: npt.DTypeLike | None = ...,
) -> npt.NDArray[Any]: ...


@overload
def linear(
    X: npt.NDArray[Any],
    weights: Sequence[PackedMatrix],
    *,
    mode: Mode = ...,
    activations: Activations = ...,
    dtype: npt.DTypeLike | None = ...,
) -> list[npt.NDArray[Any]]: ...


def linear(
    X: npt.NDArray[Any],
    weights: PackedMatrix | Sequence[PackedMatrix],
    *,
    mode: Mode = "exact",
    activations: Activations = "group",
    dtype: npt.DTypeLike | None = None,
) -> npt.NDArray[Any] | list[npt.NDArray[Any]]:
    """X (t, k), float32 or bfloat16, times W^T: (t, n); of several matrices with the same k (their
    activations are quantized once) a list.

    mode: "exact" or "fast", as the head of this module says. activations, of fast: a scale per
    "group" or per "token". dtype: of the result, None for that of X; float32 is not rounded. NaN
    and infinities become NaN.
    """
    X = np.asarray(X)
    single = isinstance(weights, PackedMatrix)
    matrices = [weights] if isinstance(weights, PackedMatrix) else list(weights)
    kind, wanted = X.dtype, X.dtype if dtype is None else np.dtype(dtype)
    if kind not in (FLOAT32, BFLOAT16) or wanted not in (FLOAT32, kind):
        raise InputError(
            f"[linear] wanted X of float32 or bfloat16 and a result of its dtype or float32, got "
            f"{kind} and {wanted}"
        )
    if mode not in ("exact", "fast") or activations not in ("group", "token"):
        raise InputError(
            f"[linear] wanted mode exact or fast and activations group or token, got {mode} and "
            f"{activations}"
        )
    X = matrix("linear", X if kind == wanted else X.astype(wanted), wanted)
    t, rows, cores = len(X), [m.shape[0] for m in matrices], [m.core for m in matrices]
    y = np.empty(t * sum(rows), wanted)
    if wanted == FLOAT32:
        _core.linear_f32(X, cores, mode == "fast", activations == "token", y)
    else:
        words = X.view(np.uint16), cores, mode == "fast", activations == "token"
        _core.linear_u16(*words, y.view(np.uint16))
    if single:
        return y.reshape(t, rows[0])
    ends = [t * end for end in accumulate(rows)]
    return [y[end - t * n : end].reshape(t, n) for n, end in zip(rows, ends, strict=True)]
