"""Phi-3 and Phi-4: Llama with q, k, v fused in one matrix and gate, up in another, rows in that
order."""

from bitwright.spec import Arch, Group, Linear

ARCH = Arch(
    name="phi3",
    blocks="model.layers",
    groups=(
        Group(
            (Linear("self_attn.qkv_proj", ("attn.q", "attn.k", "attn.v")),),
            norm="input_layernorm",
        ),
        Group((Linear("self_attn.o_proj", ("attn.o",)),), stream="input_layernorm"),
        Group(
            (Linear("mlp.gate_up_proj", ("mlp.gate", "mlp.up")),),
            norm="post_attention_layernorm",
        ),
        Group((Linear("mlp.down_proj", ("mlp.down",)),), stream="post_attention_layernorm"),
    ),
)
