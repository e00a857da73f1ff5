"""What a block is made of, as data: linears, the groups of them that share an input, heads. Taken
from bitwright.spec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Linear:
    """One weight of a block. name: path inside the block. roles: what its rows are, top to bottom
    (several for fused projections). transposed: stored as (in, out), GPT-2's Conv1D."""

    name: str
    roles: tuple[str, ...]
    transposed: bool = False


@dataclass(frozen=True)
class Group:
    """Linears of a block that share one input, solved together.

    norm: the norm whose output they read and whose gain can absorb column scales (None: no such
    norm). inside_attention: solved after q and k, while the batch is parked in the attention
    function. rows: the only rows meant of its one, fused, linear (first, end); None: all. stream:
    the norm whose input is what the outputs are added to as they are (None: there is no such norm).
    """

    linears: tuple[Linear, ...]
    norm: str | None = None
    inside_attention: bool = False
    rows: tuple[int, int] | None = None
    stream: str | None = None

    @property
    def label(self) -> str:
        return ",".join(linear.name.rsplit(".", 1)[-1] for linear in self.linears)


@dataclass(frozen=True)
class Arch:
    """An architecture as data.

    blocks: path of their list. groups: as they run. norm: how its gain works: "rms" (w * x), "rms1"
    ((1 + w) * x), "layer" (w * x + b). embeddings, head: kept in float. declared: not found by
    running a batch. fused: one call runs a block; names of its head norms and of a rotary flag.
    """

    name: str
    blocks: str
    groups: tuple[Group, ...]
    norm: Literal["rms", "rms1", "layer"] = "rms"
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    head: str = "lm_head"
    declared: bool = True
    fused: tuple[str, str, str] | None = None


@dataclass(frozen=True, eq=False)
class Heads:
    """The rows of q and of k, head below head: `queries` and `keys` heads of `width` rows, of which
    attention multiplies one with the other once they are turned, row i of a head together with row
    i + len(turns), by turns[i] radians a token (rotary positions, halves apart; 0: not turned).
    reach: tokens in a window.
    """

    queries: int
    keys: int
    width: int
    turns: npt.NDArray[np.float64]
    reach: int
