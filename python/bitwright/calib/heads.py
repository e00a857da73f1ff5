"""How a block's attention multiplies the rows of q and k, read off the model."""

from __future__ import annotations

import numpy as np

from bitwright.calib.skeleton import Skeleton
from bitwright.spec import Arch, Heads

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj")


def heads_of(skeleton: Skeleton, i: int, arch: Arch, reach: int) -> Heads | str:
    """The heads of block i in windows of `reach` tokens, or why they are not known."""
    if arch.fused is None:
        return f"the heads of {arch.name} are not declared"
    attention = skeleton.blocks[i].self_attn
    *norms, flag = arch.fused
    if any(getattr(attention, norm, None) is not None for norm in norms):
        return "norms lie between their rows and attention"
    path = skeleton.path(i)
    if any(f"{path}.{name}.bias" in skeleton.slots for name in PROJECTIONS):
        return "their biases take part in attention"
    turns = [b for name, b in skeleton.model.named_buffers() if name.endswith(".inv_freq")]
    if len(turns) != 1:
        return f"wanted one set of rotary frequencies, found {len(turns)}"
    config = skeleton.model.config.get_text_config()
    queries = int(config.num_attention_heads)
    keys = int(getattr(config, "num_key_value_heads", None) or queries)
    rows = skeleton.slots[f"{path}.{PROJECTIONS[0]}.weight"].meta.shape[0]
    angles = turns[0].double().cpu().numpy()
    angles = angles if getattr(attention, flag, True) else np.zeros_like(angles)
    return Heads(queries, keys, rows // queries, angles, reach)
