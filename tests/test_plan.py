"""The plan: each linear's scheme, what is noted, what does not fit; nothing is read or written."""

from __future__ import annotations

import pytest

import tiny_models
from bitwright import plan
from bitwright import recipe as recipes
from bitwright.demo import embedded_model
from bitwright.job import open_job
from bitwright.spec import Override, Recipe


def make(source=None, memory=None, **wishes):
    return plan.make(source or embedded_model(), Recipe(**wishes), dtype="bfloat16", memory=memory)


def test_every_linear_with_its_scheme_and_bytes():
    overrides = (Override("*.down_proj", "int8-channel"), Override("*.0.*", skip=True))
    made = make(scheme="int4-g64", overrides=overrides)
    assert len(made.rows) == 28
    schemes = {row.name: row.scheme for row in made.rows}
    assert schemes["model.layers.0.mlp.down_proj"] == "int8-channel"
    assert schemes["model.layers.0.mlp.up_proj"] == "float"
    assert schemes["model.layers.1.mlp.up_proj"] == "int4-g64"
    sizes = {row.name: row.bytes for row in made.rows}
    assert sizes["model.layers.0.mlp.up_proj"] == 2 * 768 * 256
    assert sizes["model.layers.1.mlp.up_proj"] == 768 * 256 * 4.25 / 8


def test_no_weight_is_read(monkeypatch):
    def read(*_args):
        raise RuntimeError("a plan must not read weights")

    monkeypatch.setattr("bitwright.files.safetensors.SafetensorsFile.read", read)
    assert make().tokens == 128 * 512


def test_more_tokens_need_more(monkeypatch):
    monkeypatch.setattr(plan, "_rate", lambda *_: 1e11)  # of a machine that does not waver
    few, many = make(samples=8), make(samples=512)
    assert few.ram["block"] < many.ram["block"]
    assert few.disk_bytes < many.disk_bytes
    assert few.seconds < many.seconds
    assert make(method="rtn").tokens == 0
    assert make(method="rtn").ram_bytes < few.ram_bytes


def test_the_size_of_the_output(tmp_path):
    import bitwright  # noqa: PLC0415

    for scheme in ("int4-g64", "int3-g32-asym", "int8-channel"):
        out = tmp_path / scheme
        bitwright.quantize(embedded_model(), out=out, scheme=scheme, method="rtn")
        written = (out / "model.safetensors").stat().st_size
        assert make(scheme=scheme, method="rtn").output_bytes == pytest.approx(written, rel=0.01)


def test_what_does_not_fit_is_run_again_and_said():
    roomy, tight = make(memory=64 << 30), make(memory=1)
    assert (roomy.rerun, tight.rerun) == (False, True)
    assert any("runs again" in note for note in tight.notes)
    assert any("may be taken" in note for note in tight.notes)
    assert tight.ram["block"] <= roomy.ram["block"]


def test_unused_overrides_and_readers_are_noted():
    made = make(scheme="int3-g64-asym", overrides=(Override("*.nowhere", skip=True),))
    assert any("'*.nowhere' matches no linear" in note for note in made.notes)
    assert any("asymmetric" in note for note in made.notes)


def test_a_block_of_any_architecture(tmp_path):
    for name in ("phi3", "gpt2", "opt", "gemma3"):
        base = tiny_models.save(tiny_models.make(name), tmp_path / name)
        fmt = "gptq" if name == "gpt2" else "compressed-tensors"
        made = make(base, scheme="int4-g16", format=fmt, samples=4, length=16)
        assert made.ram_bytes > made.ram_base


@pytest.mark.parametrize(
    ("samples", "wish", "batches"),
    [
        (128, {}, 8),  # every second of 16 batches, 32768 tokens
        (32, {}, 4),  # all 4: fewer than 32768 tokens
        (512, {}, 32),
        (128, {"effort": "max"}, 16),
        (128, {"scheme": "int2-g64-asym"}, 16),
        (128, {"scheme": "int2-g64-asym", "options": {"compare": 2}}, 8),
        (128, {"effort": "fast"}, 0),
        (128, {"scheme": "int2-g64-asym", "effort": "fast"}, 0),
        (128, {"options": {"alpha": 0.0}}, 0),
        (128, {"options": {"compare": 0}}, 0),
        (128, {"method": "rtn"}, 0),
    ],
)
def test_batches_of_the_float_model(samples, wish, batches):
    recipe = recipes.from_dict({"samples": samples, "length": 512, **wish})
    job = open_job(embedded_model(), recipe)
    assert (job.batch, job.compare) == (8, batches)
