"""Sums over the calibration tokens of one linear input: H = X^T X / tokens and column statistics.

H is normalised by the token count, once, here. Products are float32, sums over 512 tokens too,
above that double (csrc/ops/stats.cpp), so the result does not drift with the number of tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bitwright import ops
from bitwright.spec import InputError, Stats


class StatsCollector:
    """Collects `Stats` of inputs with k columns.

    update(x): a NumPy array or torch CPU tensor (..., k) of float32, float16 or bfloat16; leading
    dimensions are tokens; not copied when contiguous. finish(): the Stats; InputError when no token
    came or a value was NaN or infinite. hessian=False leaves H out (column statistics only).
    """

    def __init__(self, k: int, hessian: bool = True) -> None:
        self.k, self.tokens = k, 0
        self._H = np.zeros((k, k)) if hessian else None
        self._absolute = np.zeros(k)
        self._abs_max = np.zeros(k, np.float32)
        self._minimum = np.full(k, np.inf, np.float32)
        self._maximum = np.full(k, -np.inf, np.float32)

    def update(self, x: Any) -> StatsCollector:
        X = ops.as_numpy(x)
        if X.ndim == 0 or X.shape[-1] != self.k:
            raise InputError(f"[stats] wanted inputs with {self.k} columns, got shape {X.shape}")
        X = np.ascontiguousarray(X).reshape(-1, self.k)
        ops.column_stats(X, self._absolute, self._abs_max, self._minimum, self._maximum)
        if self._H is not None:
            ops.gram(X, self._H)
        self.tokens += len(X)
        return self

    def finish(self) -> Stats:
        if self.tokens == 0:
            raise InputError("[stats] wanted at least one token, got none: the input never arrived")
        if not np.isfinite(self._absolute).all():
            column = int(np.flatnonzero(~np.isfinite(self._absolute))[0])
            raise InputError(
                f"[stats] wanted finite inputs, got NaN or infinity in column {column}"
            )
        if self._H is not None:
            ops.mirror(self._H)
            self._H /= self.tokens
        mean_abs = (self._absolute / self.tokens).astype(np.float32)
        return Stats(self.tokens, self._H, mean_abs, self._abs_max, self._minimum, self._maximum)
