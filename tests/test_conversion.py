"""One result in another format: the same weights, or a refusal."""

from __future__ import annotations

import numpy as np
import pytest

import bitwright
import tiny_models
from bitwright import ops
from bitwright.files.checkpoint import Checkpoint
from bitwright.formats.dense import dense
from bitwright.spec import RefusedError

IDS = np.random.default_rng(0).integers(3, tiny_models.VOCAB, (4, 16))
OTHER = {"gptq": "compressed-tensors", "compressed-tensors": "gptq"}


def make(tmp_path, name="llama", fmt="compressed-tensors", **wishes):
    base, out = tmp_path / "base", tmp_path / "out"
    wide = {"num_key_value_heads": 4} if name == "llama" else {}  # 3 bits: multiples of 32
    tiny_models.save(tiny_models.make(name, **wide), base)
    wishes = {"scheme": "int4-g16", "method": "rtn", "samples": 4, "length": 16, **wishes}
    bitwright.quantize(base, out=out, format=fmt, calibration=IDS, **wishes)
    return out


def quantized(folder):
    view = dense(Checkpoint(folder))
    return {name: view.quantized(name) for name in view.modules}


@pytest.mark.parametrize("fmt", OTHER)
@pytest.mark.parametrize("scheme", ["int2-g16", "int3-g32-asym", "int4-channel", "int8-g16-asym"])
@pytest.mark.parametrize("name", ["llama", "phi3", "opt"])
def test_codes_scales_and_zeros_move_over(tmp_path, name, scheme, fmt):
    out = make(tmp_path, name, fmt, scheme=scheme)
    bitwright.convert(out, tmp_path / "there", format=OTHER[fmt])
    bitwright.convert(tmp_path / "there", tmp_path / "back", format=fmt)
    first, there = quantized(out), quantized(tmp_path / "there")
    for module, q in first.items():
        assert np.array_equal(q.codes, there[module].codes)
        assert np.array_equal(q.scales, there[module].scales)
        assert np.array_equal(q.zeros, there[module].zeros)
        assert np.array_equal(ops.decode(q), ops.decode(there[module]))
    files = [(f / "model.safetensors").read_bytes() for f in (out, tmp_path / "back")]
    assert files[0] == files[1]
    configs = [Checkpoint(f).config for f in (out, tmp_path / "back")]
    assert configs[0] == configs[1]


def test_an_unknown_decoder(tmp_path):
    config = tiny_models.transformers.StableLmConfig(
        **{k: v for k, v in tiny_models.COMMON.items() if k != "head_dim"}
    )
    model = tiny_models.AutoModelForCausalLM.from_config(config)
    model.config.architectures = [type(model).__name__]
    tiny_models.save(model, tmp_path / "base")
    bitwright.quantize(tmp_path / "base", out=tmp_path / "out", scheme="int4-g16", method="rtn")
    bitwright.convert(tmp_path / "out", tmp_path / "there", format="gptq")
    assert len(quantized(tmp_path / "there")) == 14


def test_what_the_other_format_cannot_hold_is_refused(tmp_path):
    out = make(tmp_path, scheme="int5-g16")
    with pytest.raises(RefusedError, match=r"int5-g16 has 5 bits"):
        bitwright.convert(out, tmp_path / "there", format="gptq")
    assert not (tmp_path / "there").exists()


def test_conv1d_cannot_leave_gptq(tmp_path):
    out = make(tmp_path, "gpt2", "gptq")
    with pytest.raises(RefusedError, match=r"stored transposed"):
        bitwright.convert(out, tmp_path / "there", format="compressed-tensors")


def test_the_report_comes_along(tmp_path):
    out = make(tmp_path, method="gptq")
    report = bitwright.convert(out, tmp_path / "there", format="gptq")
    assert report.recipe.format == "gptq"
    assert len(report.linears) == 14
    assert (tmp_path / "there" / "bitwright-report.json").exists()
    assert "format | gptq" in (tmp_path / "there" / "README.md").read_text()


def test_a_checkpoint_of_another_tool(tmp_path):
    out = make(tmp_path)
    (out / "bitwright-report.json").unlink()
    report = bitwright.convert(out, tmp_path / "there", format="gptq")
    assert report.recipe.method == "as found"
    assert quantized(tmp_path / "there").keys() == quantized(out).keys()
