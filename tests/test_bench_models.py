"""`bitwright bench DIR`: tokens a second of a quantized folder and of its original."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import folders
from bitwright import cli, ops
from bitwright.bench import models
from bitwright.hf import speed
from bitwright.spec import InputError
from problems import threads


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    base = tmp_path_factory.mktemp("homes")
    source = folders.float_folder("llama", base / "float")
    return source, folders.ours(source, base / "ours", "int4-g16")


@pytest.fixture
def two(monkeypatch):
    """Ours once and torch once: each is a process."""
    monkeypatch.setattr(models, "DTYPES", ("float32",))
    monkeypatch.setattr(models, "OURS", {"bitwright fast": {}})


@pytest.mark.usefixtures("two")
def test_the_command(homes):
    _, ours = homes
    args = ["bench", str(ours), "--quick", "--threads", "2", "--json", "-"]
    done = CliRunner().invoke(cli.app, args)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["original"] == str(homes[0])
    assert [(row["who"], row["threads"]) for row in found["rows"]] == [
        (who, n) for who in ("bitwright fast", "torch") for n in (1, 2)
    ]
    for row in found["rows"]:
        assert min(row["prefill"], row["decode"], row["load_seconds"]) > 0
        assert row["peak_rss"] > 10**8
    for word in ("prefill", "decode", "peak memory", "bitwright fast", "1 thread", "2 threads"):
        assert word in done.stderr


@pytest.mark.usefixtures("two")
def test_without_the_original_its_place_is_taken(homes, monkeypatch):
    _, ours = homes
    monkeypatch.setattr(models, "original_of", lambda *_: "")
    done = CliRunner().invoke(cli.app, ["bench", str(ours), "--quick", "--threads", "1"])
    assert done.exit_code == 0, done.output
    assert "the original is not here" in done.output


def test_every_engine_in_this_process(homes):
    """The stand-in for the original computes what our exact mode does."""
    source, ours = homes
    with threads(1):
        for engine in speed.ENGINES:
            folder = source if engine == "torch" else ours
            wish = speed.Wish(str(folder), engine, "float32", prompt=5, context=4, tokens=3)
            made = speed.measure(wish)
            assert made.speeds[0].prefill > 0
            assert made.bytes > 0
            assert ops.threads() == 1
    x = torch.arange(3, 12)[None]
    exact, floats = (
        speed.open_model(speed.Wish(str(ours), engine, "float32", "exact"))
        for engine in ("bitwright", "dequantized")
    )
    with torch.no_grad():
        assert torch.allclose(exact(x).logits, floats(x).logits, atol=1e-4)


def test_prompts_are_cut_to_what_the_model_takes(homes):
    wish = speed.Wish(str(homes[1]), prompt=5000, context=5000, tokens=5000, repeats=1)
    assert speed.speed(speed.open_model(wish), wish, 1).decode > 0


def test_loading_is_told_beyond_reading(monkeypatch):
    """Seconds for each GB; reading never takes more than that, whatever the clock says."""
    one = {"threads": 1, "prefill": 1.0, "decode": 1.0}
    found = {"speeds": [one], "read_seconds": 2.0, "bytes": 5 * 10**8, "peak_rss": 1}
    monkeypatch.setattr(models, "resolve", Path)
    monkeypatch.setattr(models, "original_of", lambda *_: "")
    for seconds, wanted in ((3.25, 2.5), (2.0, 0.0), (1.5, 0.0)):
        told = {**found, "load_seconds": seconds}
        monkeypatch.setattr(models, "_run", lambda _, told=told: told)
        rows = models.run("nowhere", threads=1).rows
        assert {(row.load_seconds, row.load_per_gb) for row in rows} == {(seconds, wanted)}


def test_what_is_timed(homes, monkeypatch):
    """Reading, then loading, each from its own beginning, without importing the model's class; the
    bytes are those of the weights."""
    clock = iter(range(100))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: 2.0 ** next(clock))
    monkeypatch.setattr(speed, "open_model", lambda _: None)
    monkeypatch.setattr(speed, "import_model", lambda _: next(clock))
    monkeypatch.setattr(speed, "speed", lambda *_: speed.Speed(1, 1.0, 1.0))
    with threads(1):
        made = speed.measure(speed.Wish(str(homes[1])))
    assert (made.read_seconds, made.load_seconds) == (1.0, 2.0**4 - 2.0**3)
    assert made.bytes == (homes[1] / "model.safetensors").stat().st_size


@pytest.mark.parametrize(("named", "sentence"), [("nowhere", "nowhere"), (None, "float")])
@pytest.mark.usefixtures("two")
def test_what_cannot_be_compared(homes, named, sentence):
    source, ours = homes
    with pytest.raises(InputError, match=sentence):
        models.run(str(ours if named else source), named, 1, quick=True)
