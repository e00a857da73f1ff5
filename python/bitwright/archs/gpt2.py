"""GPT-2: layer norms, learned positions, fused q, k, v, no gate. Its Conv1D keeps weights as (in,
out)."""

from bitwright.spec import Arch, Group, Linear

ARCH = Arch(
    name="gpt2",
    blocks="transformer.h",
    groups=(
        Group(
            (Linear("attn.c_attn", ("attn.q", "attn.k", "attn.v"), transposed=True),),
            norm="ln_1",
        ),
        Group((Linear("attn.c_proj", ("attn.o",), transposed=True),), stream="ln_1"),
        Group((Linear("mlp.c_fc", ("mlp.up",), transposed=True),), norm="ln_2"),
        Group((Linear("mlp.c_proj", ("mlp.down",), transposed=True),), stream="ln_2"),
    ),
    norm="layer",
    embeddings=("transformer.wte", "transformer.wpe"),
)
