"""The verbs of the C++ core over NumPy arrays: the only importer of `_core`.

Contracts and formulas: csrc/ops.h; a plain NumPy twin of every op: tests/ref. Here inputs are made
contiguous in plain sight, dtypes and dimensions are checked with a sentence, outputs are allocated.

Threads: `threads()` starts as the CPUs this process may use (affinity, then the cgroup's quota).
OpenMP's waiting policy is read when its library is loaded; where nobody has set one it becomes
passive, because spinning threads starve each other on small virtual machines.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from bitwright.spec import F32, F64, U8, U32, InputError, NumericalError, QTensor, Scheme

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from bitwright import _core

BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
# Candidate scales of the search, relative to the scale that just spans the range. 1 stands first,
# so
# that a group of exact codewords keeps its codes.
SEARCH_FACTORS: F32 = np.array([1.0, *(f / 100 for f in range(105, 29, -3))], np.float32)
CLIP_FACTORS: F32 = np.linspace(1.0, 0.5, 21, dtype=np.float32)
DAMPING_ATTEMPTS = 6
DAMPING_STEP = 1e-3  # the ladder of damping 0 goes on with ten times this

isa = _core.isa
levels = _core.levels
threads = _core.threads


def available_cpus() -> int:
    """CPUs this process may use: its affinity mask, less where a cgroup (v2) allows less."""
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cpus = min(cpus, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return cpus


def resolve_threads(n: int | None = None) -> int:
    """The threads that n asks for; None: OMP_NUM_THREADS where set, else all available CPUs."""
    if n is None:
        wish = os.environ.get("OMP_NUM_THREADS", "")
        return max(1, int(wish)) if wish.isdigit() else available_cpus()
    if n < 1:
        raise InputError(f"[threads] wanted at least 1 thread, got {n}")
    return n


def set_threads(n: int | None = None) -> int:
    """Sets the threads of every op, as `resolve_threads` says, and returns the number."""
    n = resolve_threads(n)
    _core.set_threads(n)
    return n


set_threads()


def _matrix(what: str, x: npt.ArrayLike, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """`x` as a contiguous 2-D array of exactly `dtype`; other dtypes are refused."""
    array = np.asarray(x)
    if array.ndim != 2 or array.dtype != np.dtype(dtype):
        raise InputError(
            f"[{what}] wanted a 2-D array of {np.dtype(dtype)}, got {array.ndim}-D of {array.dtype}"
        )
    return np.ascontiguousarray(array)


def _vector(what: str, x: npt.ArrayLike, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    array = np.asarray(x)
    if array.ndim != 1 or array.dtype != np.dtype(dtype):
        raise InputError(
            f"[{what}] wanted a 1-D array of {np.dtype(dtype)}, got {array.ndim}-D of {array.dtype}"
        )
    return np.ascontiguousarray(array)


def _sum(
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


def _bits(what: str, bits: int) -> int:
    if not 1 <= bits <= 8:
        raise InputError(f"[{what}] wanted 1 to 8 bits, got {bits}")
    return bits


def pack(codes: U8, bits: int) -> U32:
    """Codes uint8 (r, k) to uint32 words (r, ceil(k bits / 32)), least significant bit first."""
    codes = _matrix("pack", codes, np.uint8)
    words = np.zeros((codes.shape[0], -(-codes.shape[1] * _bits("pack", bits) // 32)), np.uint32)
    _core.pack(codes, bits, words)
    return words


def unpack(words: U32, bits: int, k: int) -> U8:
    """The inverse of `pack`: words uint32 (r, ceil(k bits / 32)) to codes uint8 (r, k)."""
    words = _matrix("unpack", words, np.uint32)
    if -(-k * _bits("unpack", bits) // 32) != words.shape[1]:
        raise InputError(f"[unpack] wanted words for {k} codes of {bits} bits, got {words.shape}")
    codes = np.empty((words.shape[0], k), np.uint8)
    _core.unpack(words, bits, codes)
    return codes


def _settings(scheme: Scheme, k: int, search: bool, power: float = 2.0) -> _core.FitSettings:
    if not scheme.grid.uniform:
        raise InputError(f"[ops] wanted a scheme on an integer grid, got {scheme.name}")
    if k == 0:
        raise InputError("[ops] wanted a matrix with at least one column, got none")
    return _core.FitSettings(
        bits=scheme.bits,
        group=scheme.columns(k),
        symmetric=scheme.symmetric,
        zero_min=scheme.zero_min,
        scale_grid=scheme.scale,
        power=power,
        search=search,
    )


def fit(
    W: F32,
    scheme: Scheme,
    weight: F32 | None = None,
    *,
    search: bool = False,
    power: float = 2.0,
    factors: F32 = SEARCH_FACTORS,
) -> tuple[F32, U8]:
    """Scales float32 (n, G) on the scheme's scale grid and zero points uint8 (n, G) for W (n, k).

    search=False: absmax (symmetric) or min-max. search=True: the factor of the spanning scale with
    the least sum_j weight_j |w_j - q_j|^power, power 2 or 2.4 (GPTQ, 2210.17323), weight (k) or
    ones; asymmetric schemes also try the zero points beside. Tensor schemes are always absmax /
    min-max.
    """
    W = _matrix("fit", W, np.float32)
    n, k = W.shape
    if scheme.group == -1:
        ends = np.array([[W.min(initial=0.0), W.max(initial=0.0)]], np.float32)
        scale, zero = np.empty((1, 1), np.float32), np.empty((1, 1), np.uint8)
        none = np.empty(0, np.float32)
        _core.fit(ends, none, _settings(scheme, 2, False), none, scale, zero)
        return np.repeat(scale, n, 0), np.repeat(zero, n, 0)
    settings = _settings(scheme, k, search, power)
    given = np.empty(0, np.float32) if weight is None else _vector("fit", weight, np.float32)
    if weight is not None and len(given) != k:
        raise InputError(f"[fit] wanted a weight of {k} entries, got {len(given)}")
    scales = np.empty((n, scheme.groups(k)), np.float32)
    zeros = np.empty(scales.shape, np.uint8)
    _core.fit(W, given, settings, _vector("fit", factors, np.float32), scales, zeros)
    return scales, zeros


def encode(W: F32, scales: F32, zeros: U8, scheme: Scheme) -> QTensor:
    """W (n, k) rounded to the nearest code on given scales and zero points (n, G)."""
    W = _matrix("encode", W, np.float32)
    scales, zeros = _matrix("encode", scales, np.float32), _matrix("encode", zeros, np.uint8)
    codes = np.empty(W.shape, np.uint8)
    _core.encode(W, scales, zeros, scheme.columns(W.shape[1]), scheme.bits, codes)
    return QTensor(codes, scales, zeros, scheme)


def _parts(what: str, q: QTensor) -> tuple[U8, F32, U8, int]:
    codes, zeros = _matrix(what, q.codes, np.uint8), _matrix(what, q.zeros, np.uint8)
    return codes, _matrix(what, q.scales, np.float32), zeros, q.scheme.columns(q.shape[1])


def decode(q: QTensor) -> F32:
    """`QTensor.dequantize` by the C++ core: equal bit for bit, several times faster."""
    W = np.empty(q.shape, np.float32)
    _core.decode(*_parts("decode", q), W)
    return W


def _words(what: str, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    x = np.asarray(x)
    if x.ndim != 2 or x.dtype not in (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16):
        raise InputError(
            f"[{what}] wanted a 2-D array of float32, float16 or bfloat16, got {x.ndim}-D of "
            f"{x.dtype}"
        )
    return np.ascontiguousarray(x)


def gram(X: npt.NDArray[Any], H: F64) -> None:
    """H += X^T X in place, upper triangle only (see `mirror`). X (t, k): float32, float16,
    bfloat16.
    """
    X = _words("gram", X)
    H = _sum("gram", H, np.float64, (X.shape[1], X.shape[1]))
    if X.dtype == np.float32:
        _core.gram_f32(X, H)
    else:
        _core.gram_u16(X.view(np.uint16), X.dtype == BFLOAT16, H)


def mirror(H: F64) -> None:
    """Copies the upper triangle of H into the lower one, in place."""
    _core.mirror(_sum("mirror", H, np.float64, np.shape(H)[:1] * 2))


def column_stats(
    X: npt.NDArray[Any], absolute: F64, abs_max: F32, minimum: F32, maximum: F32
) -> None:
    """Widens per-column sums of |x| and extremes (all (k,), in place) by the rows of X (t, k)."""
    X = _words("column_stats", X)
    k = X.shape[1:]
    _sum("column_stats", absolute, np.float64, k)
    for extreme in (abs_max, minimum, maximum):
        _sum("column_stats", extreme, np.float32, k)
    if X.dtype == np.float32:
        _core.column_stats_f32(X, absolute, abs_max, minimum, maximum)
    else:
        bf16 = X.dtype == BFLOAT16
        _core.column_stats_u16(X.view(np.uint16), bf16, absolute, abs_max, minimum, maximum)


def factor(
    H: F64,
    damping: float = 0.01,
    order: Sequence[int] | npt.NDArray[np.int32] | None = None,
    dead: npt.NDArray[np.bool_] | None = None,
) -> tuple[F32, float, int]:
    """R float32 (k, k), upper triangular, with R R^T = H[order][:, order] + damping mean(diag H) I.

    The mean is over the columns not marked dead; dead columns get the diagonal 1 and nothing else.
    Where a pivot is not positive the damping climbs a ladder, ten times each step (from 0 to .01).
    Returns R, the relative damping that worked and the steps climbed; NumericalError after the last
    rung.
    """
    H = _matrix("factor", H, np.float64)
    k = H.shape[0]
    wish = np.arange(k) if order is None else np.asarray(order)
    columns = wish.astype(np.int32, copy=False) if wish.dtype.kind in "iu" else wish
    columns = _vector("factor", columns, np.int32)
    dead = np.zeros(k, np.bool_) if dead is None else _vector("factor", dead, np.bool_)
    if H.shape != (k, k) or len(dead) != k or not 0 <= damping < math.inf:
        raise InputError(
            f"[factor] wanted H (k, k), dead (k) and damping >= 0, got {H.shape}, {dead.shape} and "
            f"{damping}"
        )
    mean = float(np.diagonal(H)[~dead].mean()) if not dead.all() else 1.0
    R = np.empty((k, k), np.float32)
    for rung in range(DAMPING_ATTEMPTS):
        tried = damping * 10.0**rung if damping or not rung else DAMPING_STEP * 10.0**rung
        if _core.factor(H, columns, dead.view(np.uint8), tried * mean, R):
            return R, tried, rung
    raise NumericalError(
        f"[factor] H ({k} x {k}) is not positive definite with relative damping {damping:g} to "
        f"{tried:g}"
    )


def gptq(
    W: F32, R: F32, order: npt.NDArray[np.int32], scales: F32, zeros: U8, scheme: Scheme
) -> tuple[QTensor, F64]:
    """Rounds W (n, k) with error feedback on given scales; R and order as from `factor`.

    Returns the QTensor and the loss of each row (n,), e (H + damping) e^T.
    """
    W, R = _matrix("gptq", W, np.float32), _matrix("gptq", R, np.float32)
    scales, zeros = _matrix("gptq", scales, np.float32), _matrix("gptq", zeros, np.uint8)
    codes, loss = np.empty(W.shape, np.uint8), np.empty(W.shape[0], np.float64)
    group = scheme.columns(W.shape[1])
    _core.gptq(
        W, R, _vector("gptq", order, np.int32), scales, zeros, group, scheme.bits, codes, loss
    )
    return QTensor(codes, scales, zeros, scheme), loss


def quadratic(E: F32, H: F64) -> float:
    """tr(E H E^T) for E (n, k) and symmetric H (k, k)."""
    E, H = _matrix("quadratic", E, np.float32), _matrix("quadratic", H, np.float64)
    return float(_core.quadratic(E, H))


def awq_scale(W: F32, H: F64, column_scales: F32, scheme: Scheme) -> F64:
    """For each row s of column_scales (A, k): tr(E H E^T), E = W - round(W diag(s)) diag(1/s)."""
    W, H = _matrix("awq_scale", W, np.float32), _matrix("awq_scale", H, np.float64)
    column_scales = _matrix("awq_scale", column_scales, np.float32)
    losses = np.empty(len(column_scales), np.float64)
    _core.awq_scale(W, H, column_scales, _settings(scheme, W.shape[1], False), losses)
    return losses


def awq_clip(W: F32, H: F64, scheme: Scheme, factors: F32 = CLIP_FACTORS) -> tuple[F32, U8]:
    """Scales and zeros (n, G) from the range of each group shrunk to the least e_g H_gg e_g^T."""
    W, H = _matrix("awq_clip", W, np.float32), _matrix("awq_clip", H, np.float64)
    settings = _settings(scheme, W.shape[1], False)
    scales = np.empty((W.shape[0], scheme.groups(W.shape[1])), np.float32)
    zeros = np.empty(scales.shape, np.uint8)
    _core.awq_clip(W, H, settings, _vector("awq_clip", factors, np.float32), scales, zeros)
    return scales, zeros


def qlinear(X: F32, q: QTensor) -> F32:
    """X (t, k) times the dequantized matrix transposed: float32 (t, n), exact mode."""
    X = _matrix("qlinear", X, np.float32)
    Y = np.empty((X.shape[0], q.shape[0]), np.float32)
    _core.qlinear(X, *_parts("qlinear", q), Y)
    return Y


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


def energy(x: F32) -> float:
    """Sum of squares of x (n, k), in float64: a float32 sum of millions loses four digits."""
    return float(np.einsum("ij,ij->", x, x, dtype=np.float64))


def relative_error(W: F32, q: QTensor, H: F64 | None = None, size: float | None = None) -> float:
    """tr(E H E^T) / tr(W H W^T) with E = W - Q; H = I where there is none. 0 for a zero matrix.

    size: tr(W H W^T), where it is known."""
    E = W - decode(q)
    error = energy(E) if H is None else quadratic(E, H)
    if size is None:
        size = energy(W) if H is None else quadratic(W, H)
    return error / size if size > 0 else 0.0
