"""How many threads a run has: those of our core and those of torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bitwright import ops


@contextmanager
def limited(count: int) -> Iterator[None]:
    """`count` threads for our ops and for torch, and afterwards as many as before."""
    before, torch_before = ops.threads(), torch.get_num_threads()
    ops.set_threads(count)
    torch.set_num_threads(count)
    try:
        yield
    finally:
        ops.set_threads(before)
        torch.set_num_threads(torch_before)
