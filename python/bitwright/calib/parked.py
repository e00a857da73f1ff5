"""What a batch brings where it parks, and how a block is left early (calib.capture)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from greenlet import greenlet  # type: ignore[import-untyped]
from torch import nn


class Cut(Exception):
    """Ends a rerun where its group begins."""


class NotAView(Exception):
    """v cannot be replaced inside attention."""


@dataclass(eq=False)
class Waiting:
    """A v on its way into attention: its linear, input and output."""

    group: int
    linear: nn.Module
    x: torch.Tensor
    y: torch.Tensor | None = None


@dataclass(eq=False)
class Stream:
    """One stream of a batch; quantized: it runs with the solved weights. arrived: where it hands
    over what it brings, so that no parked frame keeps it. sum: the residual stream as last seen."""

    hidden: torch.Tensor
    quantized: bool
    waiting: Waiting | None = None
    run: greenlet | None = None
    sum: torch.Tensor | None = None
    arrived: Arrival | None = None


@dataclass(frozen=True, eq=False)
class Arrival:
    """The input of a group, or a block's output; heads > 0: mixed, one matrix of rows each."""

    x: torch.Tensor
    heads: int = 0
