"""Decoder layers in one call under transformers: what the plain layers give, to rounding, for every
architecture that is declared so; and the plain layers wherever something else is asked for."""

from __future__ import annotations

import copy
import json
import shutil
import threading
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, PreTrainedModel

import bitwright
import folders
from bitwright import archs, hf, inspection, ops
from bitwright.hf import store
from bitwright.hf.fused import FusedLayer
from problems import threads

NAMES = ("llama", "llama-biased", "llama-tied", "mistral", "qwen2", "qwen3", "smollm3")
LONG: dict[str, Any] = {"max_position_embeddings": 700, "eos_token_id": None}
CHANGES: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": None}}
KEPT = "cache" if "cache" in signature(LlamaForCausalLM.forward).parameters else "past_key_values"
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 0.06}


@pytest.fixture(scope="module")
def homes(tmp_path_factory) -> Any:
    """Quantized tiny models by name, made once."""
    made: dict[str, Path] = {}

    def get(name: str, **changes: Any) -> Path:
        key = f"{name}{sorted(changes.items())}"
        if key not in made:
            base = tmp_path_factory.mktemp(name)
            source = folders.float_folder(name, base / "float", **{**LONG, **changes})
            made[key] = folders.ours(source, base / "ours", "int4-g16-asym")
        return made[key]

    return get


def load(homes: Any, name: str, **wishes: Any) -> PreTrainedModel:
    return bitwright.load(homes(name, **CHANGES.get(name, {})), **wishes)


def ids(batch: int, t: int) -> torch.Tensor:
    return torch.randint(3, 96, (batch, t), generator=torch.Generator().manual_seed(t))


def why(model: PreTrainedModel) -> set[str]:
    """What kept the layers from being one call when they ran last."""
    return {layer.why for layer in model.get_decoder().layers}


def run(model: PreTrainedModel, x: torch.Tensor, parts: tuple[int, ...] = (), **more: Any) -> Any:
    """Logits of x, given in parts that end there."""
    cache, found, begin = DynamicCache(config=model.config), [], 0
    with torch.no_grad():
        for end in (*parts, x.shape[1]):
            out = model(x[:, begin:end], **{KEPT: cache}, use_cache=True, **more)
            found.append(out.logits)
            begin = end
    return torch.cat(found, 1)


def alike(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).abs().max() <= CLOSE[a.dtype] * b.abs().max()


@pytest.fixture
def pair(homes: Any) -> Any:
    """A model, and the same with plain layers."""

    def get(name: str, **wishes: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
        return load(homes, name, **wishes), load(homes, name, fused=False, **wishes)

    return get


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("name", NAMES)
def test_equal_to_the_plain_layers(pair, name, mode, dtype):
    """A prefill, steps of one token, a batch; without a cache; all in one call each. In fast mode a
    code of the activations may fall on another side of a tie: compare where none can."""
    fused, plain = pair(name, mode=mode, dtype=dtype)
    assert set(hf.fusion(fused).values()) == {""}
    assert set(hf.fusion(plain).values()) == {"it was not asked for"}
    for x, parts in ((ids(1, 9), ()), (ids(1, 9), (5, 6, 7, 8)), (ids(3, 7), (5, 6))):
        ours = run(fused, x, parts)
        assert why(fused) == {""}
        if mode == "exact":
            alike(ours, run(plain, x, parts))
        else:
            assert (ours - run(plain, x, parts)).abs().mean() < 0.05 * ours.abs().mean()
        with torch.no_grad():
            alike(fused(x, use_cache=False).logits, run(fused, x))


@pytest.mark.parametrize("name", NAMES)
def test_one_call_for_all_layers_or_one_each(homes, name, monkeypatch):
    """The same bits; and the layers behind the first only hand on what they get."""
    calls = []
    plain = ops.blocks
    monkeypatch.setattr(
        ops, "blocks", lambda x, b, *a, **k: calls.append(len(b)) or plain(x, b, *a, **k)
    )
    model = load(homes, name)
    x = ids(2, 6)
    together = run(model, x, (4, 5))
    assert calls == [2, 2, 2]
    hook = model.get_decoder().layers[0].register_forward_hook(lambda *_: None)
    assert torch.equal(run(model, x, (4, 5)), together)
    assert calls[3:] == [1] * 6
    hook.remove()
    run(model, x)
    assert calls[9:] == [2]


def test_layers_asked_alone_give_their_own_result(homes):
    model = load(homes, "llama")
    decoder, x = model.get_decoder(), torch.randn(1, 4, 32)
    turns = decoder.rotary_emb(x, torch.arange(4)[None])
    with torch.no_grad():
        ours = decoder.layers[0](x, position_embeddings=turns)
        assert why(model) == {""}
        hf.set_fused(model, False)
        alike(ours, decoder.layers[0](x, position_embeddings=turns))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_long_generation_past_the_room_of_the_cache(pair, name):
    fused, plain = pair(name, mode="exact")
    x = ids(1, 5)
    settings = {"max_new_tokens": store.CHUNK + 40, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        ours = fused.generate(x, **settings)
        alike(run(fused, ours[:, :-1], (5, 6)), run(plain, ours[:, :-1], (5, 6)))
    assert ours.shape[1] == 5 + store.CHUNK + 40
    assert why(fused) == {""}


def test_any_number_of_threads_of_the_core_and_of_the_caller(homes):
    model, x = load(homes, "qwen2"), ids(1, 30)
    parts = tuple(range(9, 30))
    want = run(model, x, parts)
    alike(want, run(model, x))
    for n in (1, 2, 3):
        with threads(n):
            assert torch.equal(run(model, x, parts), want)
    found: dict[int, torch.Tensor] = {}
    jobs = [
        threading.Thread(target=lambda i=i: found.__setitem__(i, run(model, ids(1, 20 + i), (9,))))
        for i in range(4)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    for i, ours in found.items():
        assert torch.equal(ours, run(model, ids(1, 20 + i), (9,)))


def test_beams_move_the_cache(pair):
    fused, plain = pair("llama", mode="exact")
    settings = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        ours, theirs = (m.generate(ids(2, 6), **settings) for m in (fused, plain))
    assert torch.equal(ours, theirs)
    assert why(fused) == {""}


def test_a_padded_batch(pair):
    fused, plain = pair("llama", mode="exact")
    x, seen = ids(2, 8), torch.ones(2, 8, dtype=torch.long)
    seen[0, :3] = 0
    settings = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "attention_mask": seen}
    with torch.no_grad():
        assert torch.equal(fused.generate(x, **settings), plain.generate(x, **settings))
        assert why(fused) == {""}
        alone = fused(x[:1, 3:]).logits
        alike(fused(x, attention_mask=seen).logits[:1, 3:], alone)


def test_a_sliding_window_falls_back_once_it_is_full(homes):
    fused, plain = (
        bitwright.load(homes("mistral"), mode="exact", fused=wish) for wish in (True, False)
    )
    alike(run(fused, ids(1, 5), (2, 3)), run(plain, ids(1, 5), (2, 3)))
    assert why(fused) == {""}
    alike(run(fused, ids(1, 20), (2, 3, 5, 9, 10)), run(plain, ids(1, 20), (2, 3, 5, 9, 10)))
    assert any("sliding window" in reason for reason in why(fused))


def test_the_cache_stays_a_cache(homes):
    """Cropped, repeated, selected, reset, copied: as transformers' own; what it gave stays."""
    model, x = load(homes, "llama", mode="exact"), ids(1, 12)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        want = model(x, **{KEPT: cache}).logits
        layer = cache.layers[1]
        assert isinstance(layer, store.RoomyLayer)
        assert cache.get_seq_length() == 12
        given = layer.keys.clone(), layer.keys
        twin = copy.deepcopy(cache)
        cache.crop(-4)
        assert cache.get_seq_length() == 8
        alike(model(x[:, 8:], **{KEPT: cache}).logits, want[:, 8:])
        model(x[:, :3], **{KEPT: cache})
        assert torch.equal(*given)
        cache.batch_repeat_interleave(2)
        both = model(x[:, :1].repeat(2, 1), **{KEPT: cache}).logits
        assert torch.equal(both[0], both[1])
        cache.batch_select_indices(torch.tensor([1]))
        assert cache.layers[0].keys.shape == (1, 2, 16, 8)
        assert twin.get_seq_length() == 12
        assert torch.equal(twin.layers[1].values, model_values(model, x))
        cache.reset()
        assert cache.get_seq_length() == 0
        alike(model(x, **{KEPT: cache}).logits, want)
    assert why(model) == {""}


def model_values(model: PreTrainedModel, x: torch.Tensor) -> torch.Tensor:
    cache = DynamicCache(config=model.config)
    model(x, **{KEPT: cache})
    return cache.layers[1].values


@pytest.mark.parametrize(
    ("ask", "reason"),
    [
        ({"attention_mask": torch.ones(1, 1, 6, 6).tril()}, "a mask that is no boolean one"),
        ({"output_attentions": True}, "attention other than sdpa"),
    ],
)
def test_what_plain_layers_are_asked_for(pair, ask, reason):
    fused, plain = pair("llama", mode="exact")
    for model in (fused, plain):
        if "output_attentions" in ask:
            model.set_attn_implementation("eager")
    with torch.no_grad():
        ours, theirs = (model(ids(1, 6), **ask) for model in (fused, plain))
    alike(ours.logits, theirs.logits)
    assert all(reason in told for told in why(fused))


def test_caches_of_another_kind(pair):
    fused, plain = pair("llama", mode="exact")
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        ours, theirs = (
            m.generate(ids(1, 6), cache_implementation="static", **settings) for m in (fused, plain)
        )
    assert torch.equal(ours, theirs)
    assert all("a cache of another kind" in told for told in why(fused))


def test_hidden_states_between_the_layers(pair):
    fused, plain = pair("llama", mode="exact")
    with torch.no_grad():
        ours, theirs = (
            model(ids(1, 6), output_hidden_states=True).hidden_states for model in (fused, plain)
        )
    for a, b in zip(ours, theirs, strict=True):
        alike(a, b)
    assert why(fused) == {""}


def test_hooks_on_parts_see_what_they_would(homes):
    model, seen = load(homes, "llama"), []
    part = model.get_decoder().layers[1].mlp.gate_proj
    hook = part.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    with torch.no_grad():
        model(ids(1, 6))
    assert seen == [(1, 6, 32)]
    assert why(model) == {"", "hooks on its parts, or gradients of its norms"}
    hook.remove()


def test_gradients_and_training(homes):
    model = load(homes, "llama", mode="exact")
    x = model.get_input_embeddings()(ids(1, 6)).detach().requires_grad_()
    model(inputs_embeds=x).logits.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert why(model) == {"gradients, or hooks on all modules"}
    model.train()
    with torch.no_grad():
        model(ids(1, 6))
    assert why(model) == {"wanted evaluation in float32 or bfloat16 on the CPU"}
    model.eval()
    norm = model.get_decoder().layers[0].input_layernorm.weight.requires_grad_()
    model(ids(1, 6)).logits.sum().backward()
    assert norm.grad is not None


def test_changes_are_noticed(homes):
    """Of the mode, of norms, of a whole linear."""
    model, x = load(homes, "qwen2", mode="exact"), ids(1, 6)
    first = run(model, x)
    hf.set_mode(model, "fast")
    assert not torch.equal(run(model, x), first)
    hf.set_mode(model, "exact")
    assert torch.equal(run(model, x), first)
    layer = model.get_decoder().layers[0]
    for change in (layer.input_layernorm.weight, layer.self_attn.q_proj.bias):
        with torch.no_grad():
            change.mul_(1.5)
        after = run(model, x)
        assert not torch.equal(after, first)
        hf.set_fused(model, False)
        alike(after, run(model, x))
        hf.set_fused(model)
    layer.mlp.up_proj = torch.nn.Linear(32, 64, bias=False)
    with torch.no_grad():
        model(x)
    assert why(model) == {"", "mlp.up_proj is not quantized"}
    assert hf.fusion(model)["model.layers.0"] == "mlp.up_proj is not quantized"


def test_copies_and_float16(homes):
    model, x = load(homes, "llama", mode="exact"), ids(1, 6)
    want = run(model, x)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, x), want)
    assert why(twin) == {""}
    assert torch.equal(run(model, x), want)
    half = load(homes, "llama", mode="exact", dtype="float16")
    assert (run(half, x) - want).abs().max() < 0.02 * want.abs().max()
    assert why(half) == {"wanted evaluation in float32 or bfloat16 on the CPU"}


def test_from_pretrained_and_what_is_saved(homes, tmp_path):
    home = homes("llama")
    model = AutoModelForCausalLM.from_pretrained(home)
    assert isinstance(model.get_decoder().layers[0], FusedLayer)
    assert type(model.get_decoder().layers[0]).__name__ == "LlamaDecoderLayer"
    model.save_pretrained(tmp_path / "saved")
    assert folders.files(tmp_path / "saved") == folders.files(home)
    wish = hf.BitwrightConfig("int4-g16", fused=False)
    plain = AutoModelForCausalLM.from_pretrained(home.parent / "float", quantization_config=wish)
    assert not isinstance(plain.get_decoder().layers[0], FusedLayer)


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "phi3"])
def test_other_architectures_go_on_as_they_are(homes, name):
    model = bitwright.load(homes(name))
    told = archs.not_fused(model.config.to_dict())
    assert "is not declared for it" in told
    assert set(hf.fusion(model).values()) == {told}
    assert not any(isinstance(m, FusedLayer) for m in model.modules())


def test_other_activations_are_not_taken_for_silu(homes):
    model = bitwright.load(homes("llama", hidden_act="gelu"))
    assert set(hf.fusion(model).values()) == {"wanted SiLU, it has gelu"}


def test_inspect_tells_what_load_will_do(homes, tmp_path):
    """From the files alone, and the same as of the loaded model."""
    skip = [{"pattern": "*.0.mlp.up_proj", "skip": True}]
    source = folders.float_folder("llama", tmp_path / "float")
    partly = folders.ours(source, tmp_path / "partly", "int4-g16", overrides=skip)
    for folder, want in (
        (homes("llama"), "2 of 2 layers run in one call each"),
        (partly, "1 of 2 layers run in one call each; the others have linears in float"),
        (homes("gpt2"), "layers run operation by operation: GPT2LMHeadModel is not declared"),
    ):
        told = inspection.inspect(folder).fused
        assert told.startswith(want)
        ready = sum(not reason for reason in hf.fusion(bitwright.load(folder)).values())
        assert ready == int(told[0] if told[0].isdigit() else 0)


def test_inspect_knows_columns_in_act_order(homes, tmp_path):
    folder = shutil.copytree(homes("llama"), tmp_path / "ordered")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ordered"] = ["model.layers.0.mlp.up_proj"]
    (folder / "config.json").write_text(json.dumps(config))
    told = inspection.inspect(folder).fused
    assert told.startswith("1 of 2 layers run in one call each; the others have linears in")
