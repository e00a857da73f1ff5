"""The empty model: what it reads, what it refuses, in one sentence that names the tensor."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
import torch

import tiny_models
from bitwright.calib.skeleton import Skeleton, as_tensor, forward_dtype
from bitwright.spec import InputError


def skeleton(model) -> Skeleton:
    weights = tiny_models.weights(model)
    return Skeleton(model.config, weights.__getitem__, weights)


@pytest.fixture
def llama():
    return tiny_models.make("llama")


def test_missing_tensors_are_named(llama):
    weights = tiny_models.weights(llama)
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(
        InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight of shape \(64, 32\)"
    ):
        Skeleton(llama.config, weights.__getitem__, weights)


def test_wrong_shapes_are_named(llama):
    weights = tiny_models.weights(llama)
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name][:, :-1]
    said = r"wanted model\.layers\.1\.mlp\.up_proj\.weight of shape \(64, 32\).* got \(64, 31\)"
    with pytest.raises(InputError, match=said):
        Skeleton(llama.config, weights.__getitem__, {k: v.shape for k, v in weights.items()})
    body = Skeleton(llama.config, weights.__getitem__, list(weights))
    with pytest.raises(InputError, match=said), body.block(1):
        pass


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(llama, value):
    weights = {k: v.copy() for k, v in tiny_models.weights(llama).items()}
    weights["model.layers.0.input_layernorm.weight"][3] = value
    body = Skeleton(llama.config, weights.__getitem__, weights)
    with (
        pytest.raises(InputError, match=r"in model\.layers\.0\.input_layernorm\.weight"),
        body.block(0),
    ):
        pass


def test_integer_weights_are_refused(llama):
    weights = tiny_models.weights(llama)
    weights["model.norm.weight"] = np.ones(32, np.int8)
    body = Skeleton(llama.config, weights.__getitem__, weights)
    with pytest.raises(InputError, match=r"wanted floats in tensor model\.norm\.weight, got int8"):
        body.fill("model.norm")


def test_ids_and_windows_out_of_range(llama):
    with pytest.raises(InputError, match=r"ids below 96"):
        skeleton(llama).embed(torch.full((1, 4), 96))
    with pytest.raises(InputError, match=r"windows of at most 64"):
        skeleton(tiny_models.make("gpt2")).embed(torch.full((1, 65), 5))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"model_type": "nobody"}', '{"model_type": "llama", "hidden_size": "x"}'],
)
def test_configs_that_make_no_model(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"^\[skeleton\] wanted "):
        Skeleton(tmp_path, {}.__getitem__, ())


def test_code_in_a_checkpoint_is_never_run(tmp_path, llama):
    config = llama.config.to_dict()
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config["model_type"] = "evil"
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError):
        Skeleton(tmp_path, {}.__getitem__, ())
    assert not (tmp_path / "ran").exists()


def test_names_without_the_base_models_prefix():
    model = tiny_models.make("gpt2")
    weights = {k.removeprefix("transformer."): v for k, v in tiny_models.weights(model).items()}
    body = Skeleton(model.config, weights.__getitem__, weights)
    assert body.sources["transformer.h.0.attn.c_attn.weight"] == "h.0.attn.c_attn.weight"
    ids = tiny_models.batches()[0]
    assert torch.equal(body.embed(ids), skeleton(model).embed(ids))


def test_tied_heads_share_one_tensor():
    body = skeleton(tiny_models.make("llama-tied"))
    body.fill("lm_head")
    body.fill("model.embed_tokens")
    head, table = (
        body.model.get_parameter(n) for n in ("lm_head.weight", "model.embed_tokens.weight")
    )
    assert head.data_ptr() == table.data_ptr()


def test_arrays_become_tensors_on_the_same_memory():
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        array = np.arange(6, dtype=np.float32).astype(dtype).reshape(2, 3)
        tensor = as_tensor(array)
        assert tensor.data_ptr() == array.ctypes.data
        assert np.array_equal(tensor.float().numpy(), array.astype(np.float32))
        array.flags.writeable = False
        assert torch.equal(as_tensor(array), tensor)


@pytest.mark.parametrize(
    ("maker", "flags", "want"),
    [
        ("AuthenticAMD", "fma avx512_bf16", "bfloat16"),
        ("GenuineIntel", "fma avx512_bf16", "float32"),
        ("GenuineIntel", "avx512_bf16 amx_bf16", "bfloat16"),
        ("GenuineIntel", "avx2", "float32"),
    ],
)
def test_the_forward_dtype_follows_the_maker_and_the_instruction_set(
    monkeypatch, maker, flags, want
):
    told = f"processor\t: 0\nvendor_id\t: {maker}\nflags\t\t: {flags}\n"
    monkeypatch.setattr("pathlib.Path.read_text", lambda _: told)
    assert forward_dtype() == want
