"""Architectures as data. A module here has ARCH; `find` picks one by the class a config.json
names.

A class that fits an old family costs one line in FAMILIES. A family whose groups depend on the
config (OPT's norms before or after) offers `select(config) -> Arch` beside ARCH.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from bitwright.archs import gemma, gpt2, llama, olmo2, opt, phi3
from bitwright.spec import Arch

NAMES = ("llama", "phi3", "gemma", "olmo2", "gpt2", "opt")

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "llama",
    "Qwen3ForCausalLM": "llama",
    "SmolLM3ForCausalLM": "llama",
    "Phi3ForCausalLM": "phi3",
    "Gemma2ForCausalLM": "gemma",
    "Gemma3ForCausalLM": "gemma",
    "Olmo2ForCausalLM": "olmo2",
    "GPT2LMHeadModel": "gpt2",
    "OPTForCausalLM": "opt",
}

_MODULES: dict[str, ModuleType] = {
    module.ARCH.name: module for module in (llama, phi3, gemma, olmo2, gpt2, opt)
}


def find(config: Mapping[str, Any]) -> Arch | None:
    """The declared architecture of a config.json; None where its class is not listed."""
    classes = config.get("architectures") or [""]
    module = _MODULES.get(FAMILIES.get(classes[0], ""))
    if module is None:
        return None
    arch: Arch = module.select(config) if hasattr(module, "select") else module.ARCH
    return arch


def not_fused(config: Mapping[str, Any]) -> str:
    """Why the blocks of a config.json's model cannot each run in one call; "" if they can."""
    arch = find(config)
    if arch is None or arch.fused is None:
        return f"{(config.get('architectures') or ['the class'])[0]} is not declared for it"
    activation = config.get("hidden_act", "silu")
    return "" if activation in ("silu", "swish") else f"wanted SiLU, it has {activation}"
