"""One matrix at a time, over NumPy or torch: the solver without a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from types import ModuleType
from typing import Any, Literal, overload

import numpy as np

from bitwright import ops, registry, schemes
from bitwright.spec import F32, InputError, QTensor, Report, Scheme, Stats

SYMMETRY = 1e-2  # |H - H^T| relative to the largest diagonal entry: a product in bf16 keeps within


def require_of_a_matrix(op: str, solver: ModuleType, options: Iterable[str]) -> None:
    """InputError for an option that a matrix on its own has no use for."""
    unread = [name for name in getattr(solver, "OF_A_RUN", ()) if name in set(options)]
    if unread:
        raise InputError(
            f"[{op}] wanted options of a matrix on its own, got {', '.join(unread)}: they need a "
            "checkpoint or a transformers model"
        )


def _stats(H: Any, k: int, tokens: int | None) -> Stats:
    hessian = np.ascontiguousarray(ops.as_numpy(H), np.float64)
    if hessian.shape != (k, k):
        raise InputError(f"[quantize_matrix] H must be {k} x {k} to match W, got {hessian.shape}")
    if not np.isfinite(hessian).all():
        raise InputError("[quantize_matrix] wanted a finite H, got NaN or infinity")
    gap = float(np.abs(hessian - hessian.T).max())
    if gap > SYMMETRY * float(np.diagonal(hessian).max()):
        raise InputError(f"[quantize_matrix] wanted a symmetric H, got |H - H^T| up to {gap:.3g}")
    size = np.sqrt(np.maximum(np.diagonal(hessian), 0.0)).astype(np.float32)
    return Stats(k if tokens is None else tokens, hessian, size, size, -size, size)


def _weights(W: Any) -> F32:
    array = np.ascontiguousarray(ops.as_numpy(W).astype(np.float32))
    if array.ndim != 2 or array.size == 0:
        raise InputError(f"[quantize_matrix] wanted W of shape (out, in), got {array.shape}")
    if not np.isfinite(array).all():
        raise InputError("[quantize_matrix] wanted finite weights, got NaN or infinity")
    return array


@overload
def quantize_matrix(
    W: Any,
    H: Any = ...,
    scheme: str | Scheme = ...,
    *,
    method: str | None = ...,
    tokens: int | None = ...,
    report: Literal[False] = ...,
    **options: Any,
) -> QTensor: ...
@overload
def quantize_matrix(
    W: Any,
    H: Any = ...,
    scheme: str | Scheme = ...,
    *,
    method: str | None = ...,
    tokens: int | None = ...,
    report: Literal[True],
    **options: Any,
) -> tuple[QTensor, Report]: ...
def quantize_matrix(
    W: Any,
    H: Any = None,
    scheme: str | Scheme = "int4-g64",
    *,
    method: str | None = None,
    tokens: int | None = None,
    report: bool = False,
    **options: Any,
) -> QTensor | tuple[QTensor, Report]:
    """Quantizes W (out, in), NumPy or torch, any float dtype.

    H (in, in) = X^T X / tokens of the inputs, e.g. StatsCollector(k).update(X).finish().H. method:
    "gptq" (default where H is given) or "rtn". options: the solver's keywords (damping, scales,
    refine, negative, order; solvers/gptq.py). Returns the QTensor, with report=True also the
    Report, whose errors take about as long as a "fast" solve. A fallback is a RuntimeWarning.
    """
    solver = registry.get("solvers", method or ("rtn" if H is None else "gptq"))
    require_of_a_matrix("quantize_matrix", solver, options)
    array = _weights(W)
    wanted = schemes.parse(scheme) if isinstance(scheme, str) else scheme
    stats = None if H is None else _stats(H, array.shape[1], tokens)
    q, result = solver.solve(array, stats, wanted, errors=report, **options)
    if result.fallback and not report:
        warnings.warn(f"[quantize_matrix] {result.fallback}", RuntimeWarning, stacklevel=2)
    return (q, result) if report else q
