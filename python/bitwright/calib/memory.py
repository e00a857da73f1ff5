"""What parked activations weigh, for the plan; no torch.

While a batch is parked its frames keep alive, per token: the block's input (h), and

    q,k       the input x of the group
    v         x, and the rows of q, k, v
    o         x, the rows of q, k, v, and the input of o
    gate,up   the residual (h) and x
    down      the residual, x of gate,up, and the input of down

that is: within a half of the block, what its linears before this one have put out and attention
still holds, and the input of this group. Frames of fused projections keep more: after qkv its whole
output beside rotated q and k, after gate_up its whole output; GPT-2's block, attention's output.
"""

from __future__ import annotations

from collections.abc import Callable

from bitwright.spec import Arch, Group

Shape = Callable[[str], tuple[int, int]]


def parked_bytes(arch: Arch, shape: Shape, tokens: int, itemsize: int) -> tuple[int, ...]:
    """Bytes held when all `tokens` are parked, for each group of the arch; no working space.

    shape: (n, k) of a linear by its name inside the block. itemsize: bytes of the forward's dtype.
    """
    hidden = shape(arch.groups[0].linears[0].name)[1]
    held, rows, fused = hidden, 0, False
    values = []
    for group in arch.groups:
        k, n = shape(group.linears[0].name)[1], sum(shape(x.name)[0] for x in group.linears)
        if _plays(group, "mlp.up"):
            held, rows = (3 if group.linears[0].transposed else 2) * hidden, 0
        elif fused:
            rows += k + (rows - k) // 2
        values.append(held + rows + (n if group.inside_attention else k))
        fused = len(group.linears[0].roles) > 1
        if _plays(group, "attn.q", "attn.v"):
            held += 0 if group.inside_attention else k
            rows += n
        elif _plays(group, "mlp.up"):
            held += k + (n if fused else 0)
    return tuple(value * tokens * itemsize for value in values)


def _plays(group: Group, *roles: str) -> bool:
    return any(role in linear.roles for linear in group.linears for role in roles)
