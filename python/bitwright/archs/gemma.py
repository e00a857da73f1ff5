"""Gemma 2 and 3 (text): norms before and after both halves; the gain is (1 + w).

    x = x + rms(o(attention(rms(x))));  x = x + rms(down(act(gate(x2)) * up(x2))),  x2 = rms(x)

Gemma 2 soft-caps the attention scores and the logits; Gemma 3 has norms on the q and k heads.
"""

from bitwright.spec import Arch, Group, Linear

ARCH = Arch(
    name="gemma",
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
        Group((Linear("self_attn.o_proj", ("attn.o",)),)),
        Group(
            (
                Linear("mlp.gate_proj", ("mlp.gate",)),
                Linear("mlp.up_proj", ("mlp.up",)),
            ),
            norm="pre_feedforward_layernorm",
        ),
        Group((Linear("mlp.down_proj", ("mlp.down",)),)),
    ),
    norm="rms1",
)
