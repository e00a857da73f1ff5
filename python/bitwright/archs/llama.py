"""Llama and what is shaped like it: Mistral, Qwen2, Qwen3 (norms on q and k heads), SmolLM3
(layers without rotary positions).

    x1 = rms(x); x = x + o(attention(q(x1), k(x1), v(x1)))
    x2 = rms(x); x = x + down(act(gate(x2)) * up(x2))
"""

from bitwright.spec import Arch, Group, Linear

ARCH = Arch(
    name="llama",
    blocks="model.layers",
    groups=(
        Group(
            (
                Linear("self_attn.q_proj", ("attn.q",)),
                Linear("self_attn.k_proj", ("attn.k",)),
            ),
            norm="input_layernorm",
        ),
        Group(
            (Linear("self_attn.v_proj", ("attn.v",)),),
            norm="input_layernorm",
            inside_attention=True,
        ),
        Group((Linear("self_attn.o_proj", ("attn.o",)),), stream="input_layernorm"),
        Group(
            (
                Linear("mlp.gate_proj", ("mlp.gate",)),
                Linear("mlp.up_proj", ("mlp.up",)),
            ),
            norm="post_attention_layernorm",
        ),
        Group((Linear("mlp.down_proj", ("mlp.down",)),), stream="post_attention_layernorm"),
    ),
    fused=("q_norm", "k_norm", "use_rope"),
)
