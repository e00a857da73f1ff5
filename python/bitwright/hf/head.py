"""The head of a bfloat16 model, for the few tokens of a step: its rows are read once and multiplied
in float32 (`ops.head`), where torch's product for one token is several times slower than memory.
More tokens, gradients and tracing go to the plain linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bitwright import ops
from bitwright.calib.skeleton import as_tensor

MOST_TOKENS = 4


class FewTokensHead(nn.Linear):
    """A linear without bias that nobody trains at the moment."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As a plain linear's, to rounding."""
        W, x = self.weight, input
        plain = torch.compiler.is_compiling() or type(x) is not torch.Tensor or not W.is_cpu
        grads = torch.is_grad_enabled() and (x.requires_grad or W.requires_grad)
        bf16 = x.dtype == W.dtype == torch.bfloat16 and W.is_contiguous()
        few = x.numel() <= MOST_TOKENS * x.shape[-1]
        if plain or grads or not bf16 or not few or not x.is_cpu:
            return super().forward(input)
        y = ops.head(ops.as_numpy(x.reshape(-1, x.shape[-1])), ops.as_numpy(W))
        return as_tensor(y).view(*x.shape[:-1], W.shape[0])


def set_head(model: PreTrainedModel, quick: bool) -> None:
    """Whether the head takes this way; only a plain linear without bias does."""
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    kind: Any = type(head)
    if kind is nn.Linear and head.bias is None and quick:
        head.__class__ = FewTokensHead
    elif kind is FewTokensHead and not quick:
        head.__class__ = nn.Linear
