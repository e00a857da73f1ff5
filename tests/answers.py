"""What every solver is asked, and what holds for every answer."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np

from bitwright import registry, schemes
from bitwright.spec import QTensor, Report, Scheme
from problems import stats
from ref import to_offset_grid

SOLVERS = registry.names("solvers")
WITH_H = [name for name in SOLVERS if registry.get("solvers", name).NEEDS_H]
TWO = "int4-g16-offset-fp16-2x6"
SCHEMES = [
    "int1-g16",
    "int2-g16-asym",
    "int3-g10",
    "int3-channel-asym",
    "int4-g64",
    "int4-g1",
    "int4-tensor",
    "int8-g32-asym",
    "fp4-g16",
    "nf4-g64",
    "mxfp4",
    "nvfp4",
    "int3-g16-offset",
    TWO,
]


def solve(
    name: str, W: np.ndarray, H: np.ndarray, scheme: str | Scheme, **options: Any
) -> tuple[QTensor, Report]:
    s = schemes.parse(scheme) if isinstance(scheme, str) else scheme
    return registry.get("solvers", name).solve(W, stats(H), s, **options)


def same(a: QTensor, b: QTensor) -> bool:
    parts = ("codes", "scales", "zeros") + (("steps",) if a.scheme.block else ())
    return all(np.array_equal(getattr(a, part), getattr(b, part)) for part in parts)


def sound(q: QTensor, report: Report) -> None:
    """What holds for every result, however hard the problem was."""
    assert q.codes.max() < len(q.scheme.grid.values)
    assert q.scheme.offset or q.zeros.max() < 2**q.scheme.bits
    assert np.all(q.scales > 0)
    stored = q.scales * np.float32(q.global_scale)
    if q.steps is not None:
        multiples = q.scales / np.repeat(q.steps, q.scheme.block, 1)[:, : q.scales.shape[1]]
        assert np.array_equal(multiples, np.rint(multiples))
        stored = q.steps
    elif q.scheme.offset:
        assert np.array_equal(q.zeros, to_offset_grid(q.zeros, q.scheme.scale))
    kind = {"bf16": ml_dtypes.bfloat16, "e8m0": ml_dtypes.float8_e8m0fnu, "fp16": np.float16}
    kind = kind.get(q.scheme.scale, ml_dtypes.float8_e4m3fn)
    assert np.allclose(stored.astype(kind).astype(np.float32), stored, rtol=1e-6, atol=0)
    if q.scheme.scale == "bf16":
        assert np.all((q.scales >= 2.0**-14) & (q.scales <= 65280))
    assert np.isfinite(q.dequantize()).all()
    numbers = [v for v in report.to_dict().values() if isinstance(v, float)]
    assert all(math.isfinite(v) and v >= 0 for v in numbers)
    assert report.scheme == q.scheme.name
    assert report.shape == q.shape
