"""OLMo 2: norms only after both halves and on whole q and k, so no norm feeds a linear directly.

x = x + rms(o(attention(rms(q(x)), rms(k(x)), v(x))));  x = x + rms(down(act(gate(x)) * up(x)))
"""

from bitwright.spec import Arch, Group, Linear

ARCH = Arch(
    name="olmo2",
    blocks="model.layers",
    groups=(
        Group(
            (
                Linear("self_attn.q_proj", ("attn.q",)),
                Linear("self_attn.k_proj", ("attn.k",)),
            )
        ),
        Group((Linear("self_attn.v_proj", ("attn.v",)),), inside_attention=True),
        Group((Linear("self_attn.o_proj", ("attn.o",)),)),
        Group(
            (
                Linear("mlp.gate_proj", ("mlp.gate",)),
                Linear("mlp.up_proj", ("mlp.up",)),
            )
        ),
        Group((Linear("mlp.down_proj", ("mlp.down",)),)),
    ),
)
