"""A tiny model, quantized by us, and its twin: the float model with our dequantized weights.

Widths are what engines ask for (heads of 32, rows of 128 and 256); `changes` makes odd ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import bitwright
import tiny_models
from bitwright import ops
from bitwright.files.checkpoint import Checkpoint
from bitwright.formats.dense import Dense, dense

WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
WIDTHS = {
    "gpt2": {"n_embd": 128},
    "opt": {"hidden_size": 128, "ffn_dim": 256},
    "opt-350m": {"hidden_size": 128, "ffn_dim": 256},
}
NARROW = {"hidden_size": 80, "head_dim": 20, "intermediate_size": 240}


def llama_of(hidden: int, intermediate: int) -> dict[str, int]:
    """Four heads, whatever the width."""
    return {"hidden_size": hidden, "head_dim": hidden // 4, "intermediate_size": intermediate}


def solved() -> dict[str, Any]:
    """The wish for GPTQ at its default effort, whose scales have either sign."""
    ids = np.random.default_rng(0).integers(3, tiny_models.VOCAB, (8, 32))
    return {"method": "gptq", "calibration": ids}


def has_negative_scales(out: Path) -> bool:
    view = dense(Checkpoint(out))
    return any(bool((view.quantized(module).scales < 0).any()) for module in view.modules)


def add_tokenizer(folder: Path) -> None:
    """One word per token: some readers want a tokenizer to be there."""
    words = {f"w{i}": i for i in range(tiny_models.VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        unk_token="w0",
        bos_token="w1",
        eos_token="w2",
        pad_token="w0",
    )
    tokenizer.save_pretrained(folder)


def quantized(
    name: str,
    folder: Path,
    *,
    dtype: str = "float32",
    changes: dict[str, Any] | None = None,
    **wish: Any,
) -> tuple[Path, Path]:
    """The float checkpoint and our quantized one, rounded unless asked otherwise."""
    base, out = folder / "base", folder / "out"
    widths = changes or WIDTHS.get(name, WIDE)
    model = tiny_models.make(name, **widths).to(getattr(torch, dtype))
    tiny_models.save(model, base)
    add_tokenizer(base)
    bitwright.quantize(base, out=out, **{"method": "rtn", **wish})
    return base, out


def our_weights(view: Dense) -> dict[str, np.ndarray]:
    """Module -> canonical (out, in) values, float32."""
    return {module: ops.decode(view.quantized(module)) for module in view.modules}


@torch.no_grad()
def twin(base: Path, out: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The float model with the weights that our own reader finds in `out`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
    view = dense(Checkpoint(out))
    for module in view.modules:
        value = torch.from_numpy(view.read(f"{module}.weight"))
        model.get_submodule(module).weight.copy_(value)
    return model


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference of logits over the largest logit."""
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())
