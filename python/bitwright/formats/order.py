"""Columns in act-order, as other tools write them: a group number for each column (g_idx).

Each group has its columns somewhere in the row. Read, the columns of a group stand side by side and
QTensor.order remembers where they came from; the activations are put in that order, not the codes
out of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bitwright.spec import I32, RefusedError, Scheme


def act_order(name: str, groups: npt.NDArray[Any], scheme: Scheme) -> I32 | None:
    """The columns that put those of a group side by side, from the group of each (tensor `name`);
    None where they stand so. RefusedError unless every group has its columns."""
    size = scheme.columns(len(groups))
    plain = np.arange(len(groups)) // size
    if np.array_equal(groups, plain):
        return None
    if not np.array_equal(np.sort(groups), plain):
        raise RefusedError(
            f"[act-order] wanted groups of {size} columns in {name}, got groups of other sizes"
        )
    return np.argsort(groups, kind="stable").astype(np.int32)
