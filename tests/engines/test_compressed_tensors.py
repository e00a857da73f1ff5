"""transformers with compressed-tensors loads our folders: same weights, same logits, same text.

A folder is loaded by the very line that its model card shows. Versions differ in what they load
(see the docstring of formats/compressed_tensors.py): what 5.23 and 5.24 do not is asserted there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tiny_models
from bitwright.files.checkpoint import Checkpoint
from bitwright.formats import compressed_tensors
from bitwright.formats.dense import dense
from engines.twins import (
    NARROW,
    has_negative_scales,
    llama_of,
    our_weights,
    quantized,
    relative,
    solved,
    twin,
)

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")

pytestmark = [
    pytest.mark.engine,
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning"),
]

LOGITS = 1e-3
DEQUANTIZE = {"dequantize": True}
KNOWN = transformers.__version__.startswith(("5.23.", "5.24."))
MODELS = [name for name in tiny_models.CONFIGS if name != "gpt2"]
GROUPS = ("g32", "g64", "g128", "channel")
SCHEMES = [f"int{b}-{g}{s}" for b in (2, 3, 4, 8) for g in GROUPS for s in ("", "-asym")]
ODD = {
    "int4-channel": NARROW,
    "int3-channel-asym": NARROW,
    "int4-g20": NARROW,
    "int3-g32": llama_of(96, 288),
    "int2-g48-asym": llama_of(96, 288),
    "int5-g32": llama_of(96, 288),
    "int6-tensor": llama_of(96, 288),
    "int7-g16-asym": llama_of(96, 288),
}
MIXED = [{"pattern": "*.down_proj", "scheme": "int8-channel"}]


def by_its_card(out: Path) -> transformers.PreTrainedModel:
    """What the line on the model card loads."""
    line = compressed_tensors.load_line(out, Checkpoint(out).config)
    names = {
        n: getattr(transformers, n) for n in ("AutoModelForCausalLM", "CompressedTensorsConfig")
    }
    return eval(line, names).eval()  # our own text


def load(out: Path, dtype: str = "float32", **settings: Any) -> transformers.PreTrainedModel:
    config = transformers.CompressedTensorsConfig(**settings) if settings else None
    extra = {"quantization_config": config} if config else {}
    return transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=getattr(torch, dtype), **extra
    ).eval()


@torch.no_grad()
def assert_equal(engine: transformers.PreTrainedModel, base: Path, out: Path) -> None:
    """Logits first: the engine unpacks its weights in its first forward."""
    ids = tiny_models.batches()[0]
    float_twin = twin(base, out, engine.dtype)
    assert relative(engine(ids).logits, float_twin(ids).logits) < LOGITS
    weights = our_weights(dense(Checkpoint(out)))
    assert weights
    for module, value in weights.items():
        found = engine.get_submodule(module).weight
        assert torch.equal(found, torch.from_numpy(value).to(found.dtype)), module
    text = [
        model.generate(ids, max_new_tokens=4, do_sample=False) for model in (engine, float_twin)
    ]
    assert torch.equal(*text)
    assert text[0].shape == (2, ids.shape[1] + 4)


@pytest.mark.parametrize("name", MODELS)
def test_architectures(name, tmp_path):
    base, out = quantized(name, tmp_path, scheme="int4-g32")
    assert_equal(by_its_card(out), base, out)
    assert_equal(load(out, **DEQUANTIZE), base, out)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes(scheme, tmp_path):
    base, out = quantized("llama", tmp_path, scheme=scheme)
    assert_equal(by_its_card(out), base, out)


@pytest.mark.parametrize("scheme", ["int2-g32", "int4-g64", "int4-channel"])
def test_negative_scales(scheme, tmp_path):
    base, out = quantized("llama", tmp_path, scheme=scheme, **solved())
    assert has_negative_scales(out)
    assert_equal(by_its_card(out), base, out)
    assert_equal(load(out, **DEQUANTIZE), base, out)


@pytest.mark.parametrize("scheme", ODD)
def test_odd_shapes(scheme, tmp_path):
    """Rows that are no whole words or groups of 32, rows of outputs that are not either."""
    base, out = quantized("llama-biased", tmp_path, scheme=scheme, changes=ODD[scheme])
    assert_equal(by_its_card(out), base, out)


@pytest.mark.parametrize("scheme", ["int4-g32", "int3-g64-asym"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_models(dtype, scheme, tmp_path):
    """Loaded as they are; symmetric ones also in float32, where the weights are exactly ours."""
    base, out = quantized("llama", tmp_path, dtype=dtype, scheme=scheme)
    engine = by_its_card(out)
    assert engine.dtype == getattr(torch, dtype)
    assert_equal(engine, base, out)
    if not scheme.endswith("asym"):
        assert_equal(load(out), base, out)


@pytest.mark.parametrize(
    "overrides",
    [
        MIXED,
        [{"pattern": "*.layers.0.*", "scheme": "int3-g64"}, {"pattern": "*.v_proj", "skip": True}],
    ],
    ids=["4 and 8 bits", "by block, with a skip"],
)
def test_several_schemes(overrides, tmp_path):
    base, out = quantized("qwen2", tmp_path, scheme="int4-g32", overrides=overrides)
    assert_equal(by_its_card(out), base, out)


@pytest.mark.parametrize("scheme", ["int4-g32", "int4-g32-asym"])
def test_a_skipped_linear(scheme, tmp_path):
    """In one block only, which needs no more than its name in `ignore`."""
    skip = [{"pattern": "model.layers.1.mlp.down_proj", "skip": True}]
    base, out = quantized("llama", tmp_path, scheme=scheme, overrides=skip)
    assert "model.layers.1.mlp.down_proj.weight" in Checkpoint(out).entries
    assert_equal(by_its_card(out), base, out)


@pytest.mark.skipif(not KNOWN, reason="what other versions of transformers load is not recorded")
def test_what_the_notes_say_of_this_version(tmp_path):
    """Asymmetric by default, and several schemes with dequantize: an error, or wrong weights."""
    asymmetric = quantized("llama", tmp_path / "a", scheme="int4-g32-asym")[1]
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(asymmetric)
    base, mixed = quantized("llama", tmp_path / "b", scheme="int4-g32", overrides=MIXED)
    with pytest.raises(AssertionError):
        assert_equal(load(mixed, **DEQUANTIZE), base, mixed)
    wish = [{"pattern": "*.down_proj", "scheme": "int8-channel-asym"}]
    both = quantized("llama", tmp_path / "c", scheme="int4-g32", overrides=wish)[1]
    for settings in ({}, DEQUANTIZE):
        with pytest.raises(RuntimeError):
            load(both, **settings)
