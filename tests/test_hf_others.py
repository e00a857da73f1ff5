"""Folders of other tools: loaded on the kernels, saved in our format, inspected, converted."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

import bitwright
import folders
from bitwright import hf
from bitwright.inspection import inspect
from bitwright.spec import RefusedError
from folders import ids, logits, quant_linears

CLOSE = 1e-4
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def ct_config(**weights: object) -> dict:
    settings = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", **weights}
    group = {"targets": ["Linear"], "weights": settings, "format": "int-quantized"}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


V2 = GPTQ | {"checkpoint_format": "gptq_v2"}
ACT_ORDER = partial(folders.gptq_tensors, act_order=True)
OTHERS = {
    "gptq-v1": ("int4-g16", GPTQ, folders.gptq_tensors),
    "gptq-v1-said-to-be-ordered": ("int4-g16", GPTQ | {"desc_act": True}, folders.gptq_tensors),
    "gptq-v1-act-order": ("int4-g16", GPTQ | {"desc_act": True}, ACT_ORDER),
    "gptq-v2-2-bit": ("int2-g16-asym", V2 | {"bits": 2, "sym": False},
                      partial(folders.gptq_tensors, v1=False)),
    "gptq-v2-3-bit-act-order": ("int3-g16-asym", V2 | {"bits": 3, "sym": False},
                                partial(ACT_ORDER, v1=False)),
    "gptq-v1-8-bit": ("int8-channel", GPTQ | {"bits": 8, "group_size": -1}, folders.gptq_tensors),
    "awq": ("int4-g16-asym", AWQ, folders.awq_tensors),
    "awq-symmetric": ("int4-g16", AWQ | {"zero_point": False}, folders.awq_tensors),
    "bnb-nf4": ("nf4-g16-fp32", BNB, folders.bnb_tensors),
    "ct-int8": ("int8-channel-fp32", ct_config(), folders.int8_tensors),
    "ct-int8-asym": ("int8-g16-asym-fp32", ct_config(symmetric=False, strategy="group",
                                                     group_size=16), folders.int8_tensors),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_formats_of_other_tools(source, tmp_path, case):
    """And what save_pretrained makes of them: format bitwright, equal logits."""
    folder = folders.by_hand(source, tmp_path / "other", *OTHERS[case])
    want = folders.dense_logits(folder, ids())
    model = bitwright.load(folder, mode="exact")
    assert len(quant_linears(model)) == 14
    assert torch.allclose(logits(model), want, atol=CLOSE, rtol=0)
    whole = list(hf.fusion(model).values()).count("")
    assert inspect(folder).fused.startswith(f"{whole} of 2 layers")
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    hf.set_mode(again, "exact")
    assert torch.equal(logits(again), logits(model))
    ordered = again.config.quantization_config.ordered
    assert len(ordered) == (14 if "act-order" in case else 0)


@pytest.mark.parametrize("case", ["awq", "gptq-v1-act-order", "bnb-nf4", "ct-int8-asym"])
def test_folders_of_other_tools_are_inspected_and_converted(source, tmp_path, case):
    """Nothing rounded again; columns in act-order are refused, with what would work."""
    folder = folders.by_hand(source, tmp_path / "other", *OTHERS[case])
    found = inspect(folder)
    assert found.quant_method == OTHERS[case][1]["quant_method"]
    named = {entry.scheme.removesuffix("-fp32") for entry in found.entries}
    assert OTHERS[case][0].removesuffix("-fp32") in named
    bits = int(OTHERS[case][0].split("-")[0][-1])
    assert bits < found.bits_per_weight < 2 * bits + 6
    if "act-order" in case:
        with pytest.raises(RefusedError, match=r"in act-order, .* bitwright.load reads it"):
            bitwright.convert(folder, tmp_path / "out", format="bitwright")
        return
    bitwright.convert(folder, tmp_path / "out", format="bitwright")
    want = folders.dense_logits(folder, ids())
    assert torch.allclose(logits(bitwright.load(tmp_path / "out", mode="exact")), want, atol=CLOSE)


def test_a_quantized_head(source, tmp_path):
    """GPTQ with lm_head: true."""
    ends, config = ("_proj.weight", "lm_head.weight"), GPTQ | {"lm_head": True}
    folder = folders.by_hand(
        source, tmp_path / "other", "int4-g16", config, folders.gptq_tensors, ends
    )
    model = bitwright.load(folder, mode="exact")
    assert "lm_head" in quant_linears(model)
    want = folders.dense_logits(folder, ids())
    assert torch.allclose(logits(model), want, atol=CLOSE, rtol=0)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map="auto")
    hf.set_mode(again, "exact")
    assert torch.equal(logits(again), logits(model))
