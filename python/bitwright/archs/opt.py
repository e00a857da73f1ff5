"""OPT: layer norms with biases, learned positions, ReLU without a gate.

All sizes but 350M put the norm before the linears (`do_layer_norm_before`, the default); 350M puts
it after the residual sum, where no norm feeds a linear of the same half alone.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bitwright.spec import Arch, Group, Linear

ARCH = Arch(
    name="opt",
    blocks="model.decoder.layers",
    groups=(
        Group(
            (
                Linear("self_attn.q_proj", ("attn.q",)),
                Linear("self_attn.k_proj", ("attn.k",)),
            ),
            norm="self_attn_layer_norm",
        ),
        Group(
            (Linear("self_attn.v_proj", ("attn.v",)),),
            norm="self_attn_layer_norm",
            inside_attention=True,
        ),
        Group((Linear("self_attn.out_proj", ("attn.o",)),), stream="self_attn_layer_norm"),
        Group((Linear("fc1", ("mlp.up",)),), norm="final_layer_norm"),
        Group((Linear("fc2", ("mlp.down",)),), stream="final_layer_norm"),
    ),
    norm="layer",
    embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
)

NORM_AFTER = replace(
    ARCH, groups=tuple(replace(group, norm=None, stream=None) for group in ARCH.groups)
)


def select(config: Mapping[str, Any]) -> Arch:
    """The groups that fit where this config puts its norms."""
    return ARCH if config.get("do_layer_norm_before", True) else NORM_AFTER
