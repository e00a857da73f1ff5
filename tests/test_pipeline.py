"""A checkpoint in, a quantized checkpoint out: every architecture, method and format."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import bitwright
import tiny_models
from bitwright import registry, schemes
from bitwright.demo import embedded_model
from bitwright.files.checkpoint import Checkpoint
from bitwright.formats.dense import dense
from bitwright.spec import InputError, NumericalError, RefusedError
from bitwright.spool import Spool

SMALL = {"samples": 4, "length": 16}
IDS = np.random.default_rng(0).integers(3, tiny_models.VOCAB, (4, 16))
FORMATS = registry.names("formats")


def quantize(source, out, **wishes):
    wishes = {"scheme": "int4-g16", "dtype": "float32", **SMALL, **wishes}
    return bitwright.quantize(source, out=out, calibration=wishes.pop("calibration", IDS), **wishes)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    made = {}

    def get(name, **changes):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = tiny_models.save(tiny_models.make(name, **changes), folder)
        return made[name]

    return get


@torch.inference_mode()
def loaded(folder, base):
    """The float model of `base` with the weights that the quantized `folder` means."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    view = dense(Checkpoint(folder))
    state = model.state_dict()
    for name in view.names():
        assert name in state, f"{name} is not a tensor of the model"
        state[name].copy_(torch.from_numpy(view.read(name).astype(np.float32)))
    return model


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_every_architecture_quantizes_reads_back_and_generates(checkpoints, tmp_path, name, fmt):
    base, out = checkpoints(name), tmp_path / "out"
    if name == "gpt2" and fmt == "compressed-tensors":
        with pytest.raises(RefusedError, match=r"h\.0\.attn\.c_attn is stored transposed"):
            quantize(base, out, format=fmt)
        assert not out.exists()
        return
    report = quantize(base, out, format=fmt, strict=True)
    assert {linear.method for linear in report.linears} == {"gptq"}
    mixed = {linear.name: linear.heads for linear in report.linears if linear.heads}
    assert len(mixed) == len({re.search(r"\.(\d+)\.", x.name)[1] for x in report.linears})
    assert all(linear.tokens == IDS.size for linear in report.linears if not linear.heads)
    assert all(linear.tokens > 0 for linear in report.linears)
    errors = np.array([[linear.error, linear.error_rtn] for linear in report.linears])
    assert errors[:, 0].sum() < errors[:, 1].sum()
    model = loaded(out, base)
    ids = torch.from_numpy(IDS)
    original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.inference_mode():
        difference = (model(ids).logits - original(ids).logits).std()
        assert 0 < difference < 0.5 * original(ids).logits.std()
        generated = model.generate(ids[:1, :4], max_new_tokens=4, do_sample=False)
    assert generated.shape[1] > 4
    compared = bitwright.compare(base, out, ids=IDS)
    assert np.isfinite(compared.kl_mean)
    assert compared.kl_mean > 0


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "awq+gptq"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_method_at_every_width(checkpoints, tmp_path, method, bits):
    base, out = checkpoints("llama"), tmp_path / "out"
    report = quantize(base, out, scheme=f"int{bits}-g16-asym", method=method, strict=True)
    assert {linear.method for linear in report.linears} == {method}
    scales = {linear.awq is not None for linear in report.linears}
    assert scales == ({False} if not method.startswith("awq") else {True, False})
    kl = bitwright.compare(base, out, ids=IDS).kl_mean
    assert kl < {2: 2.0, 3: 0.5, 4: 0.1, 8: 1e-3}[bits]


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_awq_keeps_the_function_of_the_float_model(checkpoints, tmp_path, name):
    """At 8 bits the only difference is rounding: norms and weights were rescaled together."""
    base, out = checkpoints(name), tmp_path / "out"
    quantize(base, out, scheme="int8-g16-asym", method="awq")
    assert bitwright.compare(base, out, ids=IDS).kl_mean < 1e-3


def test_calibrated_methods_beat_rounding_on_the_embedded_model(tmp_path):
    kl = {}
    for method in ("rtn", "gptq", "awq", "awq+gptq"):
        out = tmp_path / method
        bitwright.quantize(
            embedded_model(), out=out, scheme="int3-g64", method=method, samples=32, length=256
        )
        kl[method] = bitwright.compare(embedded_model(), out, windows=4).kl_mean
    out = tmp_path / "fast"
    bitwright.quantize(
        embedded_model(), out=out, scheme="int3-g64", effort="fast", options={"scales": "mse"},
        samples=32, length=256,
    )  # fmt: skip
    plain = bitwright.compare(embedded_model(), out, windows=4).kl_mean
    assert kl["gptq"] < 0.66 * plain
    assert kl["gptq"] < 0.5 * kl["rtn"]
    assert kl["awq"] < kl["rtn"]
    assert kl["awq+gptq"] < 1.1 * kl["gptq"]


def test_awq_without_a_norm_to_fold_into_is_refused(checkpoints, tmp_path):
    with pytest.raises(RefusedError, match=r"olmo2 has no known norm"):
        quantize(checkpoints("olmo2"), tmp_path / "out", method="awq")


def test_an_unknown_decoder_works_by_discovery(tmp_path):
    config = tiny_models.transformers.StableLmConfig(
        **{k: v for k, v in tiny_models.COMMON.items() if k != "head_dim"}
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.config.architectures = [type(model).__name__]
    base = tiny_models.save(model, tmp_path / "base")
    for method in ("rtn", "gptq"):
        out = tmp_path / method
        report = quantize(base, out, method=method)
        assert len(report.linears) == 2 * 7
        assert loaded(out, base).generate(torch.from_numpy(IDS[:1]), max_new_tokens=2).any()
    with pytest.raises(RefusedError, match=r"stablelm has no known norm"):
        quantize(base, tmp_path / "awq", method="awq")


def test_a_mixture_of_experts_is_refused_by_name(tmp_path):
    config = tiny_models.transformers.MixtralConfig(
        **{k: v for k, v in tiny_models.COMMON.items() if k != "head_dim"}, num_local_experts=4
    )
    model = AutoModelForCausalLM.from_config(config)
    model.config.architectures = [type(model).__name__]
    base = tiny_models.save(model, tmp_path / "base")
    with pytest.raises(
        RefusedError, match=r"MixtralForCausalLM with most of its weights in model\.layers\.0"
    ):
        quantize(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parked_and_rerun_give_the_same_bytes(checkpoints, tmp_path):
    base = checkpoints("llama")
    for name, memory in (("parked", None), ("rerun", 1)):
        quantize(base, tmp_path / name, memory=memory)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("parked", "rerun")]
    assert weights[0] == weights[1]


def test_thread_counts_give_the_same_bytes(checkpoints, tmp_path):
    """Of the core; torch's own forward is kept at one thread, its sums may depend on them."""
    base = checkpoints("llama")
    for threads in (1, 2, 3):
        quantize(base, tmp_path / str(threads), method="rtn", threads=threads)
    files = [(tmp_path / str(t) / "model.safetensors").read_bytes() for t in (1, 2, 3)]
    assert files[0] == files[1] == files[2]


def test_thread_counts_give_the_same_bytes_at_every_effort(checkpoints, tmp_path, monkeypatch):
    """The solver and the sums at 1, 2 and 3 threads under one forward: torch's is kept at one."""
    monkeypatch.setattr("bitwright.pool.torch.set_num_threads", lambda _: None)
    base = checkpoints("llama")
    for effort in ("fast", "default", "max"):
        files = []
        for threads in (1, 2, 3):
            out = tmp_path / f"{effort}-{threads}"
            quantize(base, out, effort=effort, threads=threads, scheme="int3-g16-asym")
            files.append((out / "model.safetensors").read_bytes())
        assert files[0] == files[1] == files[2]


def test_the_share_of_the_drift_is_chosen_in_a_run(checkpoints, tmp_path):
    """alpha auto: of the named ones, matrix by matrix, in the report; the same with blocks run
    again."""
    wish = {"options": {"alpha": "auto"}, "scheme": "int2-g16-asym"}
    report = quantize(checkpoints("llama"), tmp_path / "out", **wish)
    shares = [linear.alpha or 0.0 for linear in report.linears]
    assert set(shares) <= {0.0, 0.25, 0.5, 0.75, 1.0}
    assert len(set(shares)) > 1
    quantize(checkpoints("llama"), tmp_path / "again", memory=1, **wish)
    files = [(tmp_path / o / "model.safetensors").read_bytes() for o in ("out", "again")]
    assert files[0] == files[1]


def test_overrides_skip_and_shards(checkpoints, tmp_path):
    base, out = checkpoints("llama"), tmp_path / "out"
    overrides = [
        {"pattern": "*.down_proj", "scheme": "int8-channel"},
        {"pattern": "model.layers.0.*", "skip": True},
        {"pattern": "*.nowhere", "skip": True},
    ]
    report = quantize(base, out, overrides=overrides, max_shard_size=20000)
    schemes = {linear.name: linear.scheme for linear in report.linears}
    assert schemes["model.layers.0.mlp.down_proj"] == "int8-channel"
    assert "model.layers.0.mlp.up_proj" not in schemes
    assert schemes["model.layers.1.mlp.up_proj"] == "int4-g16"
    assert report.unused_overrides == ("*.nowhere",)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    original, written = dense(Checkpoint(base)), dense(Checkpoint(out))
    name = "model.layers.0.mlp.up_proj.weight"
    assert np.array_equal(original.read(name), written.read(name))
    assert set(original.names()) == set(written.names())


def test_side_files_report_and_card(tmp_path):
    out = tmp_path / "out"
    base = tmp_path / "base"
    base.mkdir()
    for file in embedded_model().iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    (base / "LICENSE").write_text("the licence")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "pickle.bin").write_bytes(b"never copied")
    report = bitwright.quantize(base, out=out, method="rtn")
    copied = {"LICENSE", "chat_template.jinja", "tokenizer.json", "generation_config.json"}
    assert copied <= {p.name for p in out.iterdir()}
    assert not (out / "pickle.bin").exists()
    content = json.loads((out / "bitwright-report.json").read_text())
    assert len(content["linears"]) == len(report.linears) == 28
    card = (out / "README.md").read_text()
    assert str(out) in card
    assert "int4-g64" in card
    scores = bitwright.compare(base, out, windows=1, length=64)
    bitwright.papers.record(out, scores.to_dict())
    assert f"{scores.kl_mean:.4f}" in (out / "README.md").read_text()


def test_two_runs_give_the_same_folder(checkpoints, tmp_path):
    base = checkpoints("llama")
    first = quantize(base, tmp_path / "out") and contents(tmp_path / "out")
    quantize(base, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == first


def test_strict_turns_a_fallback_into_an_error(checkpoints, tmp_path, monkeypatch):
    def never(*_args, **_keywords):
        raise NumericalError("[factor] H is not positive definite")

    monkeypatch.setattr("bitwright.ops.factor", never)
    report = quantize(checkpoints("llama"), tmp_path / "lax")
    assert len(report.fallbacks) == len(report.linears)
    assert {linear.method for linear in report.linears} == {"rtn"}
    with pytest.raises(NumericalError, match=r"14 of 14 linears did not get gptq"):
        quantize(checkpoints("llama"), tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


def test_what_is_written_is_compared_with_what_was_meant(checkpoints, tmp_path, monkeypatch):
    fmt = registry.get("formats", "compressed-tensors")
    write = fmt.write

    def wrong(name, q, dtype):
        arrays = write(name, q, dtype)
        if name.endswith("1.mlp.up_proj"):
            arrays[f"{name}.weight_packed"][0, 0] ^= 1
        return arrays

    monkeypatch.setattr(fmt, "write", wrong)
    with pytest.raises(bitwright.VerificationError, match=r"layers\.1\.mlp\.up_proj"):
        quantize(checkpoints("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.part").exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(tmp_path, bad):
    model = tiny_models.make("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = bad
    base = tiny_models.save(model, tmp_path / "base")
    for method in ("rtn", "gptq"):
        with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight"):
            quantize(base, tmp_path / method, method=method)
        assert not (tmp_path / method).exists()


def test_destinations_and_sources_that_cannot_be_used(checkpoints, tmp_path):
    base = checkpoints("llama")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("someone's")
    with pytest.raises(InputError, match=r"which is not ours"):
        quantize(base, tmp_path / "other")
    assert (tmp_path / "other" / "file").read_text() == "someone's"
    quantize(base, tmp_path / "out")
    with pytest.raises(InputError, match=r"--overwrite"):
        quantize(base, tmp_path / "out")
    with pytest.raises(InputError, match=r"already quantized \(compressed-tensors\)"):
        quantize(tmp_path / "out", tmp_path / "again")
    with pytest.raises(InputError, match=r"wanted a folder or a hub id"):
        quantize(tmp_path / "nowhere", tmp_path / "again")
    with pytest.raises(InputError, match=r"ids below 96|token ids below 96"):
        quantize(base, tmp_path / "again", calibration=np.full((4, 16), 96))
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "scheme", ["nf4-g16", "mxfp4", "int3-g16-offset", "int4-g16-offset-fp16-2x6"]
)
def test_any_scheme_in_our_own_format(checkpoints, tmp_path, scheme):
    """Folder to folder and read back; interrupted behind the first block the bytes are the same."""
    base = checkpoints("llama")
    wishes = {"scheme": scheme, "format": "bitwright"}
    report = quantize(base, tmp_path / "whole", **wishes)
    assert {linear.scheme for linear in report.linears} == {schemes.parse(scheme).name}
    assert all(linear.error < linear.error_rtn for linear in report.linears)
    name = report.linears[0].name
    error = Checkpoint(base).read(f"{name}.weight").astype(np.float32)
    error = error - dense(Checkpoint(tmp_path / "whole")).read(f"{name}.weight")
    assert 0 < np.abs(error).max() < 0.2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitwright.spool.Spool.save", interrupted_after(9, Spool.save))
        with pytest.raises(KeyboardInterrupt):
            quantize(base, tmp_path / "again", **wishes)
    quantize(base, tmp_path / "again", **wishes)
    whole, again = contents(tmp_path / "whole"), contents(tmp_path / "again")
    assert {p: b for p, b in whole.items() if p.suffix == ".safetensors"} == {
        p: b for p, b in again.items() if p.suffix == ".safetensors"
    }


def interrupted_after(n, save):
    calls = iter(range(n))

    def saved(*args):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return save(*args)

    return saved


@pytest.mark.parametrize(
    ("wish", "share"),
    [
        ({}, 0.125), ({"scheme": "int2-g16-asym"}, 0.375), ({"scheme": "int3-g16"}, 0.25),
        ({"options": {"residual": 0.0}}, None),
        ({"options": {"residual": 0.5}}, 0.5), ({"effort": "fast"}, None),
    ],
    ids=str,
)  # fmt: skip
def test_o_and_down_make_up_for_the_residual_stream(checkpoints, tmp_path, wish, share):
    report = quantize(checkpoints("llama"), tmp_path / "out", **wish)
    found = {linear.name.rsplit(".", 1)[-1]: linear.residual for linear in report.linears}
    assert {name for name, r in found.items() if r is not None} == (
        {"o_proj", "down_proj"} if share else set()
    )
    assert found["down_proj"] == share
    assert ("residual stream" in report.solver()) == bool(share)
