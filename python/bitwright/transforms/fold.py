"""Moves column scales into the norm in front: gain' = gain / s, in the checkpoint's dtype.

The stored gain is rounded, so the scales that the weights get are recomputed from it,
s = gain / gain': the float function changes by nothing but the rounding of a LayerNorm's bias.
Where the dtype cannot hold the new gain or bias, the channel keeps the scale 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bitwright.spec import F32, Held, Stats


def fold(
    gain: npt.NDArray[Any], bias: npt.NDArray[Any] | None, s: F32, kind: str
) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None, F32]:
    """Norm gain (k,), bias (k,) or None and scales (k,) to the new gain, the new bias and the exact
    scales float32 (k,). kind as in spec.Arch: "rms", "layer": the gain is stored; "rms1": gain -
    1."""
    offset = 1.0 if kind == "rms1" else 0.0
    old = gain.astype(np.float64) + offset
    with np.errstate(over="ignore"):
        stored = (old / s - offset).astype(gain.dtype)
    new = stored.astype(np.float64) + offset
    usable = (old != 0.0) & (new != 0.0) & np.isfinite(new)
    exact = np.where(usable, old / np.where(usable, new, 1.0), 1.0)
    if bias is not None:
        with np.errstate(over="ignore"):
            usable &= np.isfinite((bias / exact).astype(bias.dtype).astype(np.float64))
        exact = np.where(usable, exact, 1.0)
    stored = np.where(usable, stored, gain)
    new_bias = None if bias is None else (bias.astype(np.float64) / exact).astype(bias.dtype)
    return stored, new_bias, exact.astype(np.float32)


def scale_stats(stats: Stats, s: F32) -> Stats:
    """The statistics of X diag(1/s)."""
    inverse = 1.0 / s.astype(np.float64)
    single = inverse.astype(np.float32)
    square = inverse[:, None] * inverse[None, :]
    H = None if stats.H is None else stats.H * square
    C = None if stats.C is None else stats.C * square
    held = stats.held
    if held is not None:
        held = Held(held.H * square, held.C * square, held.share)
    return Stats(
        stats.tokens,
        H,
        stats.mean_abs * single,
        stats.abs_max * single,
        stats.minimum * single,
        stats.maximum * single,
        C,
        held,
        None if stats.D is None else stats.D * inverse,
    )
