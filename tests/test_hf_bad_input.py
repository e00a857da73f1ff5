"""What cannot be run: one sentence each, from load and from from_pretrained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

import bitwright
import folders
from bitwright import hf
from bitwright.spec import BitwrightError, InputError, RefusedError


def edited(folder: Path, out: Path, **changes) -> Path:
    """A copy of a folder with another config.json; None drops a key."""
    shutil.copytree(folder, out)
    config = json.loads((folder / "config.json").read_text()) | changes
    (out / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return out


def settings_of(folder: Path, **changes) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"] | changes


BOTH = pytest.mark.parametrize("way", [bitwright.load, AutoModelForCausalLM.from_pretrained],
                               ids=["load", "from_pretrained"])  # fmt: skip


@BOTH
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"scheme": "int9-g64"}, "wanted <grid>-g<group>"),
        ({"scheme": None}, "wanted .*scheme"),
        ({"scheme": 7}, "wanted .*scheme"),
        ({"schemes": {"model.layers.0.mlp.up_proj": "x"}}, "wanted <grid>-g<group>"),
        ({"scheme": "int4-g32-asym"}, r"scales as bfloat16 \(\d+, \d\)"),
        ({"scheme": "int8-g16-asym"}, r"codes as int32 \(\d+, \d+\)"),
    ],
)
def test_hostile_settings_are_one_sentence(quantized, tmp_path, way, change, sentence):
    folder = edited(quantized, tmp_path / "x", quantization_config=settings_of(quantized, **change))
    with pytest.raises(BitwrightError, match=sentence) as caught:
        way(folder)
    assert "\n" not in str(caught.value)


@BOTH
def test_a_file_and_a_config_that_do_not_fit(quantized, tmp_path, way):
    wide = edited(quantized, tmp_path / "wide", intermediate_size=128)
    with pytest.raises(InputError, match=r"mlp\.\w+_proj.* as the config asks.*got"):
        way(wide)
    cut = edited(quantized, tmp_path / "cut")
    path = cut / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"cut short|could not|wanted \d+ bytes"):
        way(cut)
    tensors = folders.load_bytes(quantized)
    lost = edited(quantized, tmp_path / "lost")
    for name in [n for n in tensors if n.startswith("model.layers.1.mlp.up_proj.")]:
        del tensors[name]
    folders.save_bytes(lost, tensors)
    with pytest.raises(InputError, match=r"wanted .*layers\.1\.mlp\.up_proj.*"):
        way(lost)


def test_what_load_refuses_by_name(source, quantized, tmp_path):
    with pytest.raises(InputError, match=r"got .* in float: `bitwright quantize` makes one, or"):
        bitwright.load(source)
    with pytest.raises(InputError, match=r"wanted a folder or a hub id"):
        bitwright.load(tmp_path / "nowhere")
    for method in ("hqq", "fp8", "quanto"):
        folder = edited(quantized, tmp_path / method, quantization_config={"quant_method": method})
        with pytest.raises(InputError, match=f"got quant_method '{method}'"):
            bitwright.load(folder)
    with pytest.raises(InputError, match="wanted mode fast or exact"):
        bitwright.load(quantized, mode="slow")
    with pytest.raises(InputError, match="wanted the settings of a bitwright config, got bits"):
        hf.BitwrightConfig(bits=4)
    with pytest.raises(InputError, match="wanted the model on the CPU, got device_map"):
        AutoModelForCausalLM.from_pretrained(quantized, device_map={"": "cuda:0"})
    for bad, sentence in ((["re:("], "is not valid"), ("down", "lists of names as skip")):
        config = hf.BitwrightConfig(skip=bad)
        with pytest.raises(InputError, match=sentence):
            AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    config = hf.BitwrightConfig("int4")
    with pytest.raises(RefusedError, match="wanted <grid>"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=config)


UNKNOWN = {
    "bitwright": [({"rotation": "hadamard"}, "rotation = hadamard")],
    "gptq": [
        ({"rotation": "quarot"}, "rotation = quarot"),
        ({"adapter": {"name": "lora", "rank": 8}}, "adapter = "),
        ({"is_marlin_format": True}, "is_marlin_format = True"),
    ],
    "compressed-tensors": [
        ({"transform_config": {"config_groups": {"R1": {}}}}, "transform_config = "),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config = "),
        ({"tomorrow": 1}, "tomorrow = 1"),
    ],
}


@pytest.mark.parametrize("method", UNKNOWN)
def test_settings_that_nobody_knows_are_refused_by_name(source, tmp_path, method):
    """They could mean other weights; empty ones mean nothing."""
    made = tmp_path / "made"
    bitwright.quantize(source, out=made, scheme="int4-g16", method="rtn", format=method)
    for i, (change, sentence) in enumerate(UNKNOWN[method]):
        wrong = settings_of(made, **change)
        folder = edited(made, tmp_path / str(i), quantization_config=wrong)
        with pytest.raises(RefusedError, match=f"wanted settings that are known, got {sentence}"):
            bitwright.load(folder)
        empty = settings_of(made, **{name: type(value)() for name, value in change.items()})
        bitwright.load(edited(made, tmp_path / f"{i}-empty", quantization_config=empty))


def test_settings_inside_groups_are_refused_by_name(source, tmp_path):
    made = tmp_path / "made"
    bitwright.quantize(source, out=made, scheme="int4-g16", method="rtn")
    for where in ("group", "weights"):
        wrong = settings_of(made)
        group = wrong["config_groups"]["group_0"]
        (group if where == "group" else group["weights"])["dithered"] = True
        folder = edited(made, tmp_path / where, quantization_config=wrong)
        with pytest.raises(RefusedError, match="wanted settings that are known, got dithered"):
            bitwright.load(folder)
    dense = settings_of(made, sparsity_config={"format": "dense", "global_sparsity": 0.1})
    bitwright.load(edited(made, tmp_path / "dense", quantization_config=dense))


def test_nan_in_a_file_is_found(quantized, tmp_path):
    for name in ("model.layers.0.mlp.up_proj.scales", "model.norm.weight"):
        tensors = folders.load_bytes(quantized)
        tensors[name] = np.full_like(tensors[name], np.nan)
        folder = edited(quantized, tmp_path / name)
        folders.save_bytes(folder, tensors)
        with pytest.raises(InputError, match="wanted finite"):
            bitwright.load(folder)
