"""Sums over the calibration tokens of one linear input: H = X^T X / tokens and column statistics.

H, and the drift matrix C where two inputs are given, are normalised by the token count, once, here.
Products are float32, sums over 512 tokens too, above that double (csrc/ops/stats.cpp), so the
result does not drift with the number of tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bitwright import ops
from bitwright.calib.sums import CoreSums, Sums
from bitwright.spec import F64, Held, InputError, Stats


class StatsCollector:
    """Collects `Stats` of inputs with k columns.

    update(x): a NumPy array or torch CPU tensor (..., k) of float32, float16 or bfloat16; leading
    dimensions are tokens; not copied when contiguous. update(x, drift_from): x is what became of
    the inputs `drift_from` (same shape), and C = (drift_from - x)^T x / tokens is kept too, over
    the tokens for which both were given. stream, with `drift_from`: what the outputs are added to,
    here and in the model that `drift_from` came from, each (..., h); their D is kept too. heads: x
    is (heads, ..., k), and each head has its own H and C. finish(): the Stats; InputError when no
    token came or a value was NaN or infinite. hessian=False: column statistics only. hold: the
    second half of each update with `drift_from` is counted apart too (`Stats.held`). products: of
    bfloat16 inputs, "float32" or "bfloat16" (ops.sums); None: the latter where the machine has it.
    sums: who adds in the core's place (`calib.device`); inputs may then lie there.
    """

    def __init__(
        self,
        k: int,
        heads: int = 0,
        *,
        hessian: bool = True,
        hold: bool = False,
        products: str | None = None,
        sums: Sums | None = None,
    ) -> None:
        self.k, self.heads, self.hold, self.tokens = k, heads, hold, 0
        self.sums: Sums = sums or CoreSums(k, products)
        self._H: Any = self.sums.zeros(self._shape) if hessian else None
        self._C: Any = None
        self._D: Any = None
        self._held: tuple[Any, Any] | None = None
        self._compared = self._held_tokens = 0

    @property
    def _shape(self) -> tuple[int, ...]:
        return (self.heads, self.k, self.k) if self.heads else (self.k, self.k)

    def _rows(self, x: Any) -> Any:
        X = self.sums.take(x)
        wrong_heads = self.heads and (X.ndim < 2 or X.shape[0] != self.heads)
        if X.ndim == 0 or X.shape[-1] != self.k or wrong_heads:
            head = f" of {self.heads} heads" if self.heads else ""
            raise InputError(
                f"[stats] wanted inputs{head} with {self.k} columns, got shape {tuple(X.shape)}"
            )
        return self.sums.shaped(X, (max(self.heads, 1), -1, self.k))

    def update(
        self, x: Any, drift_from: Any = None, stream: tuple[Any, Any] | None = None
    ) -> StatsCollector:
        X = self._rows(x)
        before = None if drift_from is None else self._rows(drift_from)
        if before is not None and before.shape != X.shape:
            raise InputError(
                f"[stats] wanted {tuple(X.shape)} inputs to drift from, got {tuple(before.shape)}"
            )
        self.sums.columns(X.reshape(-1, self.k))
        self.tokens += X.shape[1]
        if self._H is None:
            return self
        if before is None:
            self._add(X, None, self._H, None)
            return self
        if self._C is None:
            self._C = self.sums.zeros(self._shape)
        if stream is not None:
            self._add_stream(X[0], stream)
        fit = X.shape[1] - X.shape[1] // 2 if self.hold else X.shape[1]
        self._add(X[:, :fit], before[:, :fit], self._H, self._C)
        if fit < X.shape[1]:
            self._held = self._held or (self.sums.zeros(self._shape), self.sums.zeros(self._shape))
            self._add(X[:, fit:], before[:, fit:], *self._held)
            self._held_tokens += X.shape[1] - fit
        self._compared += X.shape[1]
        return self

    def _add_stream(self, X: Any, stream: tuple[Any, Any]) -> None:
        after, before = (self.sums.take(s) for s in stream)
        after, before = (s.reshape(len(X), -1) for s in (after, before))
        if self._D is None:
            self._D = self.sums.zeros((after.shape[1], self.k))
        self.sums.cross(before, X, self._D, after)

    def _add(self, X: Any, before: Any, H: Any, C: Any) -> None:
        for head in range(len(X)):
            self.sums.gram(X[head], self._of(H, head))
            if before is not None:
                self.sums.cross(before[head], X[head], self._of(C, head))

    def _of(self, matrices: Any, head: int) -> Any:
        return matrices[head] if self.heads else matrices

    def finish(self) -> Stats:
        if self.tokens == 0:
            raise InputError("[stats] wanted at least one token, got none: the input never arrived")
        absolute, abs_max, minimum, maximum = self.sums.column_sums()
        if not np.isfinite(absolute).all():
            column = int(np.flatnonzero(~np.isfinite(absolute))[0])
            raise InputError(
                f"[stats] wanted finite inputs, got NaN or infinity in column {column}"
            )
        self._to_host()
        held = self._finish_held()
        if self._H is not None:
            self._mirror(self._H)
            self._H /= self.tokens
        if self._C is not None:
            self._C /= self._compared
        if self._D is not None:
            if not np.isfinite(self._D).all():
                raise InputError(
                    "[stats] wanted finite sums that the outputs are added to, got NaN or infinity"
                )
            self._D /= self._compared
        mean_abs = (absolute / (self.tokens * max(self.heads, 1))).astype(np.float32)
        extremes = (abs_max, minimum, maximum)
        return Stats(self.tokens, self._H, mean_abs, *extremes, C=self._C, held=held, D=self._D)

    def _to_host(self) -> None:
        """One after the other, so that the device gives each back before the next is taken."""
        for name in ("_H", "_C", "_D"):
            there = getattr(self, name)
            setattr(self, name, None if there is None else self.sums.host(there))
        if self._held is not None:
            H, C = self._held
            self._held = self.sums.host(H), self.sums.host(C)

    def _finish_held(self) -> Held | None:
        if self._held is None or self._H is None or self._C is None:
            return None
        H, C = self._held
        self._H += H
        self._C += C
        self._mirror(H)
        H /= self._held_tokens
        C /= self._held_tokens
        return Held(H, C, self._held_tokens / self._compared)

    def _mirror(self, matrices: F64) -> None:
        for head in range(max(self.heads, 1)):
            ops.mirror(self._of(matrices, head))
