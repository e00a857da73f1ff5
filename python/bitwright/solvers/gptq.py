"""GPTQ (2210.17323), inverse-free, with the scales searched inside the feedback and the result
refined.

Objective per row: (w - q) H (w - q)^T over q on the grid. With H + damping = R R^T, R upper
triangular, it is sum_k (R_kk (t_k - q_k))^2 with the targets

    t_k = w_k + (1 / R_kk) sum_{j<k} e_j R_jk,    e_j = w_j - q_j,

so rounding t_k in order is the reference recursion with one Cholesky instead of Cholesky, inverse
and Cholesky. Sections below are those of docs/solver.md.

Target (9). Where the inputs drifted from those of the float model, C = (X_float - X)^T X / tokens,
w is w + alpha w C (H + damping)^-1: alpha 1 minimises |W X_float - Q X|^2, the default .5 trusts
half of it (measured: better than all at 4 and at 2 bits), and "auto" takes of ALPHAS the one with
the least |W X_float - (W + alpha delta) X|^2 on the tokens that Stats.held counts apart, delta from
the others (what the layer wants, not the model: at 2 bits KL .863 against .831 of the half).
Linears whose outputs are added to the residual stream S make up for a share r, `residual`, of its
error as well: alpha W C + r D in the place of alpha W C, D = (S_float - S)^T X / tokens (LoaQ,
WaterSIC). Measured, 32 x 512 tokens, two texts: int4-g64 KL .0588 / .0631 without, .0545 / .0612
with 1/8, the default, .0654 / .0719 with 1/2; int3-g64-asym .221 / .226 without, .199 / .203 with
1/8, .191 / .203 with 1/4, the default; int2-g64-asym .767 / .803 without, .660 / .717 with 1/4,
.650 / .694 with 3/8, the default (128 x 512, all of them compared: .580 / .619 and .560 / .580).

Rows of q and k (11). `coupled`: rows of a head are solved in turn under what attention multiplies
them with (`solve_in_turn`); 128 x 512 tokens: int4-g64 KL .0501 / .0504 without and .0467 / .0502
with it, int3-g64-asym .184 / .181 and .179 / .178.

Blocks of rows may have an H (and C) each: v's KV heads, under their attention-mixed inputs. How the
statistics are taken: `attention` n, v's inputs mixed by every n-th query, 0: plain; `compare` n,
the float model runs alongside every n-th batch (1.6: five of eight; 128 x 512 tokens, every second
one and every one: int4-g64 KL .0501 / .0504 and .0485 / .0471, int3-g64-asym .184 / .181 and .176 /
.167, int2-g64-asym .613 / .632 and .580 / .619, two of three .593 / .622), at least 32768 tokens,
0: not at all (nor where alpha is 0 and residual is not given). `gram_dtype`: what bfloat16 inputs
are multiplied in, "float32" or "bfloat16", by the machine's own product of pairs; "auto": the
latter where it has one (SmolLM2-135M, int4-g64, four draws, two texts each: KL of the latter over
the former +5.4 / +1.9, +2.6 / +2.7, -3.0 / -1.3 and +1.8 / +3.2 %, as much as draws differ).

Scales. "feedback" (6.3): for each row and group the candidate with the least loss after the group's
own feedback, 25 scales around the range of the group's targets, zero points z0 and beside it. Of
tables the range may end before the last level, scales up to 1.7 of the spanning one: nvfp4, 32 x
512 tokens, two texts: KL .0452 / .0470 without and .0391 / .0429 with it.
Static ones, chosen before the sweep: "hessian" minimises sum_j H_jj (w_j - q_j)^2 over 26 shrunk
ranges, "mse" the reference's |.|^2.4, "minmax" takes the range.

Refinement (7), `refine` a pattern of c and l: coordinate descent over the codes (c), least squares
over the scales (l), each step lowering the damped objective.

Order "gar": columns sorted by diag H inside their group, groups by their largest, both descending;
groups stay whole, so no g_idx is stored. Damping is relative to mean diag H: .01 at 4 bits and
more, .02 at 3, .05 below (measured); where H is not positive definite it climbs a ladder, and after
the last rung the result is plain rounding on "hessian" scales, named as fallback. Dead columns
(diag H = 0) are rounded plainly. Tensor schemes and order "act" keep static scales.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bitwright import ops
from bitwright.hessian import rows as under
from bitwright.hessian.factored import Factored, factored
from bitwright.hessian.target import (
    ALPHA,
    Drifts,
    drifts_of,
    residual_of,
    share_of_drift,
)
from bitwright.spec import (
    F32,
    F64,
    InputError,
    QTensor,
    Report,
    Scheme,
    Stats,
)

NEEDS_H = True
EFFORTS: Mapping[str, Mapping[str, Any]] = {
    "fast": {"scales": "hessian", "refine": "", "alpha": 0.0, "residual": 0.0},
    "default": {"alpha": ALPHA, "attention": 8, "compare": 1.6, "coupled": True},
    "max": {
        "alpha": ALPHA,
        "attention": 2,
        "compare": 1,
        "coupled": True,
        "refine": "cccl" + "clc" * 6,
    },
}
# What a single matrix, of which nothing but H is known, has no use for.
OF_A_RUN = ("attention", "compare", "gram_dtype", "coupled", "alpha", "residual")
DAMPING = {1: 0.05, 2: 0.05, 3: 0.02}  # by bits, else DEFAULT_DAMPING
DEFAULT_DAMPING = 0.01
PATTERN = "ccclclc"
SCALES = ("feedback", "hessian", "mse", "minmax")
ORDERS = ("gar", "act", "natural")
GRAM_DTYPES = ("auto", "float32", "bfloat16")


def check(options: Mapping[str, Any]) -> None:
    """InputError for an option that `solve`, or who takes the statistics for it, could not use."""
    for name, known in (("scales", SCALES), ("order", ORDERS), ("gram_dtype", GRAM_DTYPES)):
        value = options.get(name, known[0])
        if value not in known:
            listed = f"{', '.join(known[:-1])} or {known[-1]}"
            raise InputError(f"[gptq] {name} must be {listed}, got {value!r}")
    if not isinstance(options.get("coupled", False), bool):
        raise InputError(f"[gptq] coupled must be true or false, got {options['coupled']!r}")
    pattern = options.get("refine", PATTERN)
    if not isinstance(pattern, str) or set(pattern) - {"c", "l"}:
        raise InputError(f"[gptq] refine must consist of c and l, got {pattern!r}")
    share_of_drift(options.get("alpha", ALPHA))
    value = options.get("attention", 0)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InputError(f"[gptq] attention must be a whole number from 0 on, got {value!r}")
    value = options.get("compare", 0)
    if isinstance(value, bool | str) or not (value == 0 or 1 <= value < math.inf):
        raise InputError(f"[gptq] compare must be 0 or a number from 1 on, got {value!r}")
    for name, most in (("damping", math.inf), ("residual", 1.0)):
        value = options.get(name) or 0.0
        if isinstance(value, str) or not 0.0 <= value <= most or value == math.inf:
            limit = "a number from 0 on" if name == "damping" else "0 to 1"
            raise InputError(f"[gptq] {name} must be {limit}, got {value!r}")


Prepared = tuple[Factored, ...]


def _hessians(stats: Stats | None) -> F64:
    """H of each block of rows, (B, k, k)."""
    if stats is None or stats.H is None:
        raise InputError("[gptq] wanted Stats with H, got none: GPTQ needs calibration inputs")
    k = stats.H.shape[-1]
    return stats.H.reshape(-1, k, k)


def prepare(
    stats: Stats | None,
    scheme: Scheme,
    *,
    damping: float | None = None,
    order: str = "gar",
    **_options: object,
) -> Prepared:
    """Order and factor of each H, for all matrices with these inputs and this group size."""
    check({"order": order, "damping": damping})
    wish = DAMPING.get(scheme.bits, DEFAULT_DAMPING) if damping is None else damping
    return tuple(factored(H, scheme, wish, order) for H in _hessians(stats))


def _share(part: float, size: float) -> float:
    return 0.0 if size <= 0 else part / size


def solve(
    W: F32,
    stats: Stats | None,
    scheme: Scheme,
    *,
    prepared: Prepared | None = None,
    damping: float | None = None,
    order: str = "gar",
    scales: str = "feedback",
    refine: str = PATTERN,
    alpha: float | str = ALPHA,
    residual: float | None = None,
    attention: int = 0,  # noqa: ARG001  the statistics were taken with these three
    compare: float = 0,  # noqa: ARG001
    gram_dtype: str = "auto",  # noqa: ARG001
    negative: bool = False,
    whole: F32 | None = None,
    last: bool = False,
    coupled: bool = False,  # noqa: ARG001  solve_in_turn
    errors: bool = True,
) -> tuple[QTensor, Report]:
    """W float32 (n, k) rounded with error feedback under stats.H: (k, k), or (B, k, k) for B equal
    blocks of rows. whole: the matrix of which W is a part, where it is. last: no other matrix asks
    for the drift in `stats`, which goes as soon as it has served. errors: whether those of the
    report are wanted, half the time of a "fast" solve; else they are NaN. Options: see above."""
    H = _hessians(stats)
    if len(W) % len(H):
        raise InputError(f"[gptq] wanted rows for {len(H)} equal blocks, got {len(W)}")
    if stats is None:
        raise InputError("[gptq] wanted Stats with H, got none")
    factors = prepared or prepare(stats, scheme, damping=damping, order=order)
    o = _options(order, scales, refine, alpha, negative, W if whole is None else whole, errors)
    drifts, pull = _drifts(stats, H, o, residual, scheme, last)
    rows = len(W) // len(H)
    parts = [
        under.solve_rows(W[b * rows : (b + 1) * rows], H[b], drifts, p, scheme, o)
        for b, p in enumerate(factors)
    ]
    report = _report(W.shape, parts, factors, stats, scheme, pull)
    return ops.stacked([part.q for part in parts]), report


def solve_in_turn(
    matrices: Sequence[F32],
    metrics: Sequence[F64],
    stats: Stats,
    scheme: Scheme,
    *,
    prepared: Prepared | None = None,
    damping: float | None = None,
    order: str = "gar",
    scales: str = "feedback",
    refine: str = PATTERN,
    alpha: float | str = ALPHA,
    residual: float | None = None,
    negative: bool = False,
    last: bool = False,
    errors: bool = True,
    **_options_of_a_run: object,
) -> list[tuple[QTensor, Report]]:
    """`solve` of matrices with one H (k, k), the rows of a head in turn under its metric: (heads,
    d, d) for each matrix of heads of d rows. Turns go through all matrices at once, unless a scale
    belongs to a whole one."""
    H = _hessians(stats)
    if len(H) != 1:
        raise InputError(f"[gptq] wanted one H for rows in turn, got {len(H)}")
    factors = prepared or prepare(stats, scheme, damping=damping, order=order)
    o = _options(order, scales, refine, alpha, negative, matrices[0], errors)
    drifts, pull = _drifts(stats, H, o, residual, scheme, last)
    given = list(zip(matrices, metrics, strict=True))
    batches, parts = [[one] for one in given] if scheme.of_whole else [given], []
    for batch in batches:
        group, their = zip(*batch, strict=True)
        left = drifts if batch is batches[-1] else drifts[:1]
        asked = replace(o, whole=group[0])
        parts += under.solve_in_turn(group, their, H[0], left, factors[0], scheme, asked)
    reports = [
        _report(W.shape, [part], factors, stats, scheme, pull)
        for W, part in zip(matrices, parts, strict=True)
    ]
    return [
        (part.q, replace(report, coupled=not report.fallback))
        for part, report in zip(parts, reports, strict=True)
    ]


def _options(
    order: str,
    scales: str,
    refine: str,
    alpha: float | str,
    negative: bool,
    whole: F32,
    errors: bool,
) -> under.Options:
    check({"scales": scales, "order": order, "refine": refine, "alpha": alpha})
    return under.Options(order, scales, refine, share_of_drift(alpha), negative, whole, errors)


def _drifts(
    stats: Stats, H: F64, o: under.Options, residual: float | None, scheme: Scheme, last: bool
) -> tuple[list[Drifts | None], float | None]:
    """Of each block of rows; and the share of the stream's error in them."""
    check({"residual": residual})
    pull = residual_of(residual, scheme.bits)
    drifts: list[Drifts | None] = [None] * len(H)
    if o.alpha != 0.0 or (pull and stats.D is not None):
        drifts = drifts_of(stats, H, pull, last)
    if last:
        stats.release()
    return drifts, pull if drifts[0] is not None and drifts[0].pull is not None else None


def _report(
    shape: tuple[int, ...],
    parts: list[under.Part],
    factors: Prepared,
    stats: Stats,
    scheme: Scheme,
    pull: float | None,
) -> Report:
    alphas = [part.alpha for part in parts if part.alpha is not None]
    size, swept = sum(part.size for part in parts), [part.swept for part in parts]
    failures = [p.failure for p in factors if p.failure]
    k = shape[1]
    short = stats.tokens < k
    return Report(
        name="",
        shape=(shape[0], k),
        scheme=scheme.name,
        method="rtn" if failures else "gptq",
        bits_per_weight=scheme.bits_per_weight(shape[0], k),
        error_rtn=_share(sum(part.plain for part in parts), size),
        error=_share(sum(part.final for part in parts), size),
        error_swept=None if None in swept else _share(sum(filter(None, swept)), size),
        tokens=stats.tokens,
        damping=max(p.damping for p in factors),
        rung=max(p.rung for p in factors),
        dead=int(sum(p.dead.sum() for p in factors)),
        alpha=float(np.mean(alphas)) if alphas else None,
        residual=pull if alphas else None,
        heads=0 if stats.H is None or stats.H.ndim < 3 else len(factors),
        fallback=f"plain rounding on hessian scales: {failures[0]}" if failures else "",
        notes=(f"{stats.tokens} tokens for {k} columns: H is under-determined",) if short else (),
    )
