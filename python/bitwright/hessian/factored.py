"""H of one input, ordered, damped and factored: what all matrices that read it share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitwright import ops
from bitwright.spec import F32, F64, InputError, NumericalError, Scheme

DEAD = 1e-12  # diagonal, relative to its largest entry, below which a column carries no signal


@dataclass(frozen=True, eq=False)
class Factored:
    """Factor of one ordered H; R None: no rung of the damping ladder worked, `failure` says so.

    damping: relative; added: the same in H's units."""

    R: F32 | None
    order: npt.NDArray[np.int32]
    dead: npt.NDArray[np.bool_]
    damping: float
    added: float
    rung: int
    failure: str = ""

    @property
    def factor(self) -> F32:
        if self.R is None:
            raise InputError("[gptq] wanted a factor of H, got none")
        return self.R


def column_order(diagonal: F64, group: int, order: str) -> npt.NDArray[np.int32]:
    """Columns in solving order: "gar" (solvers/gptq.py), "act" (descending diagonal), "natural"."""
    k = len(diagonal)
    if order == "natural":
        return np.arange(k, dtype=np.int32)
    if order == "act":
        return np.argsort(-diagonal, kind="stable").astype(np.int32)
    groups = [np.arange(first, min(first + group, k)) for first in range(0, k, group)]
    peaks = np.array([diagonal[columns].max() for columns in groups])
    inside = [columns[np.argsort(-diagonal[columns], kind="stable")] for columns in groups]
    ranked = [inside[g] for g in np.argsort(-peaks, kind="stable")]
    return np.concatenate(ranked).astype(np.int32)


def factored(H: F64, scheme: Scheme, damping: float, order: str) -> Factored:
    diagonal = np.ascontiguousarray(np.diagonal(H))
    dead = diagonal <= DEAD * diagonal.max(initial=0.0)
    columns = column_order(diagonal, scheme.columns(len(H)), order)
    mean = float(diagonal[~dead].mean()) if not dead.all() else 1.0
    try:
        R, used, rung = ops.factor(H, damping, columns, dead)
    except NumericalError as error:
        rungs = ops.DAMPING_ATTEMPTS
        return Factored(None, columns, dead, damping, damping * mean, rungs, str(error))
    return Factored(R, columns, dead, used, used * mean, rung)
