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

Between stages the heap is left with holes that no batch will fill again; on 128 x 512 tokens of a
135M model (428 MB parked, bf16) `trim` after each stage took the peak from 887 to 689 MB for 5 %
of the time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress

from bitwright.spec import Arch, Group

Shape = Callable[[str], tuple[int, int]]


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
    """Bytes that one batch of `tokens` needs beside what is parked: the widest group's outputs and
    their product, and a norm's float32 copies."""
    hidden = shape(arch.groups[0].linears[0].name)[1]
    rows = max(sum(shape(x.name)[0] for x in group.linears) for group in arch.groups)
    return tokens * (2 * rows * itemsize + 3 * hidden * 4)


def trim() -> None:
    """Give freed heap pages back to the system (glibc; nothing elsewhere)."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _plays(group: Group, *roles: str) -> bool:
    return any(role in linear.roles for linear in group.linears for role in roles)
