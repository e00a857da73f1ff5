"""Round to nearest, W (n, k) on its own: data-free.

Symmetric s = max|w| / (2^(b-1) - 1), z = 2^(b-1); asymmetric s = (hi - lo) / (2^b - 1), z =
clamp(round(-lo / s)), lo <= 0 <= hi. scales="mse" shrinks the range per group to the least
sum |w - q|^2.4 (GPTQ's search, 2210.17323); scales="clip" to the least e_g H_gg e_g^T, H_gg the
group's block of H (AWQ's clipping, 2306.00978), needs Stats and leaves tensor schemes as they are.
Limits: errors are not fed back; below 4 bit it collapses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bitwright import ops
from bitwright.spec import F32, F64, U8, InputError, QTensor, Report, Scheme, Stats

NEEDS_H = False
SCALES = ("minmax", "mse", "clip")
EFFORTS: Mapping[str, Mapping[str, Any]] = {"fast": {}, "default": {}, "max": {}}


def check(options: Mapping[str, Any]) -> None:
    """InputError for an option that `solve` could not use."""
    scales = options.get("scales", "minmax")
    if scales not in SCALES:
        raise InputError(f"[rtn] scales must be minmax, mse or clip, got {scales!r}")


def prepare(stats: Stats | None, scheme: Scheme, **options: object) -> None:
    """Nothing is shared between matrices."""


def _scales(W: F32, H: F64 | None, scheme: Scheme, scales: str) -> tuple[F32, U8 | F32]:
    if scales == "mse":
        return ops.fit(W, scheme, search=True, power=2.4)
    if H is None:
        raise InputError("[rtn] scales clip wanted Stats with H, got none")
    return ops.fit(W, scheme) if scheme.group == -1 else ops.awq_clip(W, H, scheme)


def solve(
    W: F32,
    stats: Stats | None,
    scheme: Scheme,
    *,
    prepared: None = None,  # noqa: ARG001
    scales: str = "minmax",
    errors: bool = True,
) -> tuple[QTensor, Report]:
    """W float32 (n, k) rounded to nearest; scales "minmax", "mse" or "clip". errors: whether
    those of the report are wanted; else they are NaN."""
    check({"scales": scales})
    if scales == "clip" and not scheme.plain:
        raise InputError(f"[rtn] scales clip want a plain integer scheme, got {scheme.name}")
    H = None if stats is None else stats.H
    minmax = scales == "minmax"
    q = ops.encode(W, *(ops.fit(W, scheme) if minmax else _scales(W, H, scheme, scales)), scheme)
    error = ops.relative_error(W, q, H) if errors else math.nan
    error_rtn = error
    if errors and not minmax:
        error_rtn = ops.relative_error(W, ops.encode(W, *ops.fit(W, scheme), scheme), H)
    report = Report(
        name="",
        shape=q.shape,
        scheme=scheme.name,
        method="rtn",
        bits_per_weight=scheme.bits_per_weight(*q.shape),
        error_rtn=error_rtn,
        error=error,
        tokens=0 if stats is None else stats.tokens,
    )
    return q, report
