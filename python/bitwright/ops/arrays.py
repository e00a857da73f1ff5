"""Arrays as the ops take them: contiguous, of one dtype, or refused with a sentence."""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from bitwright import _core
from bitwright.spec import F32, U8, InputError, QTensor, Scheme

BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)


def _array(what: str, x: npt.ArrayLike, dtype: npt.DTypeLike, ndim: int) -> npt.NDArray[Any]:
    array, kind = np.asarray(x), np.dtype(dtype)
    if array.ndim != ndim or array.dtype != kind:
        raise InputError(
            f"[{what}] wanted a {ndim}-D array of {kind}, got {array.ndim}-D of {array.dtype}"
        )
    return np.ascontiguousarray(array)


def matrix(what: str, x: npt.ArrayLike, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """`x` as a contiguous 2-D array of exactly `dtype`; other dtypes are refused."""
    return _array(what, x, dtype, 2)


def vector(what: str, x: npt.ArrayLike, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """`x` as a contiguous 1-D array of exactly `dtype`; other dtypes are refused."""
    return _array(what, x, dtype, 1)


def in_place(
    what: str, x: npt.NDArray[Any], dtype: npt.DTypeLike, shape: tuple[int, ...]
) -> npt.NDArray[Any]:
    """`x` itself, an array that an op adds to in place: a converted copy would be lost."""
    array = np.asarray(x)
    layout = "" if array.flags.c_contiguous else "strided "
    layout += "" if array.flags.writeable else "read-only "
    if array is not x or layout or array.dtype != np.dtype(dtype) or array.shape != shape:
        raise InputError(
            f"[{what}] wanted a contiguous, writable array of {np.dtype(dtype)} {shape} to add to, "
            f"got a {layout}{type(x).__name__} of {array.dtype} {array.shape}"
        )
    return array


def floats(what: str, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    x = np.asarray(x)
    if x.ndim != 2 or x.dtype not in (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16):
        raise InputError(
            f"[{what}] wanted a 2-D array of float32, float16 or bfloat16, got {x.ndim}-D of "
            f"{x.dtype}"
        )
    return np.ascontiguousarray(x)


def check_bits(what: str, bits: int) -> int:
    if not 1 <= bits <= 8:
        raise InputError(f"[{what}] wanted 1 to 8 bits, got {bits}")
    return bits


@lru_cache(maxsize=256)
def core_grid(scheme: Scheme) -> _core.Grid:
    grid = scheme.grid
    levels = [] if grid.uniform else list(grid.values)
    return _core.Grid(
        bits=grid.bits, levels=levels, middles=list(grid.middles), offset=scheme.offset
    )


def fit_settings(
    scheme: Scheme,
    k: int,
    search: bool,
    power: float = 2.0,
    zero_span: int = 1,
    negative: bool = False,
    global_scale: float = 1.0,
) -> _core.FitSettings:
    if k == 0:
        raise InputError("[ops] wanted a matrix with at least one column, got none")
    return _core.FitSettings(
        grid=core_grid(scheme),
        group=scheme.columns(k),
        symmetric=scheme.symmetric,
        zero_min=scheme.zero_min,
        scale_grid=scheme.scale,
        global_scale=global_scale,
        power=power,
        search=search,
        zero_span=zero_span,
        negative=negative,
        block=scheme.block,
        scale_bits=scheme.scale_bits,
    )


def parts(what: str, q: QTensor) -> tuple[U8, F32, F32, int]:
    codes, zeros = matrix(what, q.codes, np.uint8), zeros_in(what, q.zeros, q.scheme)
    return codes, matrix(what, q.scales, np.float32), zeros, q.scheme.columns(q.shape[1])


def zeros_in(what: str, zeros: U8 | F32, scheme: Scheme) -> F32:
    """Zero points as the core takes them: float32, in codes, or offsets in the weights' units."""
    given = matrix(what, zeros, np.float32 if scheme.offset else np.uint8)
    return given.astype(np.float32, copy=False)


def zeros_out(zeros: F32, scheme: Scheme) -> U8 | F32:
    """Zero points of the core as a QTensor keeps them."""
    return zeros if scheme.offset else zeros.astype(np.uint8)


def steps_in(what: str, steps: F32 | None, n: int) -> F32:
    """Steps of two-level scales as the core takes them: none are (n, 0)."""
    return np.empty((n, 0), np.float32) if steps is None else matrix(what, steps, np.float32)


def as_numpy(x: Any) -> npt.NDArray[Any]:
    """A NumPy view of an array or a torch CPU tensor, without a copy; bfloat16 as ml_dtypes'."""
    if isinstance(x, np.ndarray):
        return x
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        x = x.detach()
        if x.dtype == torch.bfloat16:
            words: npt.NDArray[Any] = x.view(torch.int16).numpy()
            return words.view(BFLOAT16)
        array: npt.NDArray[Any] = x.numpy()
        return array
    return np.from_dlpack(x) if hasattr(x, "__dlpack__") else np.asarray(x)
