"""What activations weigh, for the plan, and giving freed memory back; no torch.

While a batch is parked its frames keep alive, per token: the block's input (h), and

    q,k       the input x of the group
    v         x, and the rows of q, k, v
    o         x, the rows of q, k, v, and the input of o
    gate,up   the residual (h) and x
    down      the residual, x of gate,up, and the input of down

that is: within a half of the block, what its linears before this one have put out and attention
still holds, and the input of this group. Frames of fused projections keep more: after qkv its whole
output beside rotated q and k, after gate_up its whole output; GPT-2's block, attention's output.

What a batch frees on its way leaves holes in the heap that the next one does not always fill (an
aligned block does not fit into a hole of its size). `trim` gives them back: 128 x 512 tokens
through blocks of a 135M model (408 MiB parked, bf16) peaked at 1150 MiB without, at 883 with one
after every stage and every fourth batch. But what comes next asks for these pages again, a tenth of
that run: so a `Heap`, asked after every batch and stage, trims only where the process holds more
than the plan leaves it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bitwright.spec import Arch, Group

Shape = Callable[[str], tuple[int, int]]
HOLES = 8  # that the plan leaves room for, of a batch's widest activation each
MOST_HOLES = 128 << 20  # bytes; blocks above 32 MiB glibc maps on their own, they leave no hole


def parked_bytes(arch: Arch, shape: Shape, tokens: int, itemsize: int) -> dict[str, int]:
    """Bytes held when all `tokens` are parked at a group, by its first linear; no working space.

    shape: (n, k) of a linear by its name inside the block. itemsize: bytes of the forward's dtype.
    """
    hidden = shape(arch.groups[0].linears[0].name)[1]
    held, rows, fused = hidden, 0, False
    per_token = {}
    for group in arch.groups:
        k, n = shape(group.linears[0].name)[1], sum(shape(x.name)[0] for x in group.linears)
        if _plays(group, "mlp.up"):
            held, rows = (3 if group.linears[0].transposed else 2) * hidden, 0
        elif fused:
            rows += k + (rows - k) // 2
        per_token[group.linears[0].name] = held + rows + (n if group.inside_attention else k)
        fused = len(group.linears[0].roles) > 1
        if _plays(group, "attn.q", "attn.v"):
            held += 0 if group.inside_attention else k
            rows += n
        elif _plays(group, "mlp.up"):
            held += k + (n if fused else 0)
    return {name: value * tokens * itemsize for name, value in per_token.items()}


def working_bytes(arch: Arch, shape: Shape, tokens: int, itemsize: int) -> int:
    """Bytes that one batch of `tokens` needs beside what is parked: four activations as wide as the
    widest input (gate, up and their products; the terms of a GELU), or a norm's float32 copies.
    """
    hidden = shape(arch.groups[0].linears[0].name)[1]
    return tokens * max(4 * _widest(arch, shape) * itemsize, hidden * (3 * 4 + itemsize))


def hole_bytes(arch: Arch, shape: Shape, tokens: int, itemsize: int) -> int:
    """Bytes that the plan leaves for holes of the heap, where batches have `tokens`."""
    return min(HOLES * tokens * _widest(arch, shape) * itemsize, MOST_HOLES)


def _widest(arch: Arch, shape: Shape) -> int:
    return max(shape(group.linears[0].name)[1] for group in arch.groups)


def resident_bytes(peak: bool = False) -> int:
    """Resident memory of this process now, or its highest so far (VmRSS, VmHWM)."""
    key = "VmHWM:" if peak else "VmRSS:"
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(key)), 0)


def trim() -> None:
    """Give freed heap pages back to the system (glibc; nothing elsewhere)."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True)
class Heap:
    """ceiling: resident bytes of this process above which freed pages are given back."""

    ceiling: int = 0

    def trim(self) -> None:
        if self.ceiling == 0 or resident_bytes() > self.ceiling:
            trim()


def _plays(group: Group, *roles: str) -> bool:
    return any(role in linear.roles for linear in group.linears for role in roles)
