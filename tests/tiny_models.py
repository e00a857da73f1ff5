"""Tiny random models of every declared architecture, from their config classes; no downloads.

Two or three blocks of width 32, with what is special about each: grouped heads, windows shorter
than the text, soft caps, biases, tied heads, projections around OPT's blocks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCAB = 96
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
GEMMA = {"num_hidden_layers": 3, "sliding_window": 6, "query_pre_attn_scalar": 8}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", COMMON),
    "llama-biased": ("LlamaConfig", {**COMMON, "attention_bias": True, "mlp_bias": True}),
    "llama-mqa": ("LlamaConfig", {**COMMON, "num_key_value_heads": 1}),
    "llama-tied": ("LlamaConfig", {**COMMON, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**COMMON, "sliding_window": 6}),
    "qwen2": ("Qwen2Config", COMMON),
    "qwen3": ("Qwen3Config", COMMON),
    "smollm3": ("SmolLM3Config", {**COMMON, "no_rope_layer_interval": 2}),
    "phi3": ("Phi3Config", COMMON),
    "gemma2": ("Gemma2Config", {**COMMON, **GEMMA, "layer_types": LAYERS}),
    "gemma3": ("Gemma3TextConfig", {**COMMON, **GEMMA, "layer_types": LAYERS}),
    "olmo2": ("Olmo2Config", COMMON),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCAB,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "opt": ("OPTConfig", OPT),
    "opt-350m": ("OPTConfig", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16}),
}


def make(name: str, **changes: Any) -> PreTrainedModel:
    """The model `name` in float32 with seeded weights, norms and biases included."""
    kind, options = CONFIGS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**options, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.config.architectures = [type(model).__name__]
    return model


def weights(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """What a checkpoint of the model holds: tied weights once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {k: v.numpy() for k, v in model.state_dict().items() if k not in tied}


def save(model: PreTrainedModel, folder: Path) -> Path:
    """The model as a checkpoint folder."""
    model.save_pretrained(folder)
    return folder


def batches() -> list[torch.Tensor]:
    """Token ids, three batches, the last with another shape."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 16), (2, 16), (1, 16))
    return [torch.randint(3, VOCAB, shape, generator=generator) for shape in shapes]
