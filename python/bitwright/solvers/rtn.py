"""Round to nearest, W (n, k) on its own: data-free.

Symmetric s = max|w| / (2^(b-1) - 1), z = 2^(b-1); asymmetric s = (hi - lo) / (2^b - 1), z =
clamp(round(-lo / s)), lo <= 0 <= hi. scales="mse" shrinks the range per group to the least
sum |w - q|^2.4 (GPTQ's search, 2210.17323). Limits: ignores the inputs; below 4 bit it collapses.
"""

from __future__ import annotations

from bitwright import ops
from bitwright.spec import F32, InputError, QTensor, Report, Scheme, Stats

NEEDS_H = False


def prepare(stats: Stats | None, scheme: Scheme, **options: object) -> None:  # noqa: ARG001
    """Nothing is shared between matrices."""


def solve(
    W: F32,
    stats: Stats | None,
    scheme: Scheme,
    *,
    prepared: None = None,  # noqa: ARG001
    scales: str = "minmax",
) -> tuple[QTensor, Report]:
    """W float32 (n, k) rounded to nearest; scales "minmax" or "mse". Stats only serve the report."""
    if scales not in ("minmax", "mse"):
        raise InputError(f"[rtn] scales must be minmax or mse, got {scales!r}")
    q = ops.encode(W, *ops.fit(W, scheme, search=scales == "mse", power=2.4), scheme)
    error = ops.relative_error(W, q, None if stats is None else stats.H)
    report = Report(
        name="",
        shape=q.shape,
        scheme=scheme.name,
        method="rtn",
        bits_per_weight=scheme.bits_per_weight(*q.shape),
        error_rtn=error,
        error=error,
        tokens=0 if stats is None else stats.tokens,
    )
    return q, report
