"""The command line: shapes, defaults, JSON, exit codes, one sentence for wrong input."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import bitwright
from bitwright import cli, options
from bitwright.demo import embedded_model
from bitwright.spec import NumericalError, VerificationError

TINY = str(embedded_model())
FAST = ["--samples", "4", "--length", "64"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        return CliRunner().invoke(cli.app, [str(a) for a in arguments])

    return call


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "out"
    bitwright.quantize(embedded_model(), out=out, samples=4, length=64)
    return out


def test_quantize_ends_with_the_line_that_loads_the_result(run):
    done = run("quantize", TINY, "out", "--scheme", "int4-g64", *FAST, "--json", "report.json")
    assert done.exit_code == 0, done.output
    last = done.output.strip().splitlines()[-1]
    assert last.endswith('model = AutoModelForCausalLM.from_pretrained("out")')
    report = json.loads(Path("report.json").read_text())
    assert report["recipe"]["method"] == "gptq"
    assert report["recipe"]["format"] == "compressed-tensors"
    assert report["peak_rss"] > 0
    assert report["tokens"] == 256
    assert not Path("out.work").exists()


def test_the_profile_tells_where_each_block_went(run):
    done = run("quantize", TINY, "out", *FAST, "--effort", "fast", "--profile", "--json", "r.json")
    assert done.exit_code == 0, done.output
    heads = next(line for line in done.output.splitlines() if line.startswith("block"))
    assert heads.split() == ["block", "seconds", "forward", "statistics", "solve", "I/O"]
    report = json.loads(Path("r.json").read_text())
    assert len(report["blocks"]) == 4
    for block in report["blocks"]:
        assert set(block) == {"forward", "statistics", "solve", "read", "save"}
    for phase in ("forward", "statistics", "solve"):
        inside = sum(block[phase] for block in report["blocks"])
        assert 0 < inside <= report["seconds"][phase] + 1e-9
    assert sum(report["shares"].values()) == pytest.approx(1.0)
    assert any(line.startswith("shares") for line in done.output.splitlines())
    assert "blocks" not in json.loads(Path("out/bitwright-report.json").read_text())


def test_the_shipped_text_is_named(run):
    done = run("quantize", TINY, "out", *FAST)
    assert "windows of old English prose, " in done.output
    assert "windows of old English prose, " in Path("out/README.md").read_text()
    books = run("quantize", TINY, "books-out", *FAST, "--calibration", "books")
    assert "the shipped text books" in books.output


def test_json_to_stdout_leaves_nothing_else_there(run):
    done = run("quantize", TINY, "out", "--method", "rtn", "--json", "-", "--quiet")
    assert len(json.loads(done.stdout)["linears"]) == 28


def test_a_finished_result_is_refused_unless_overwritten(run):
    assert run("quantize", TINY, "out", "--method", "rtn").exit_code == 0
    again = run("quantize", TINY, "out", "--method", "rtn")
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr
    assert run("quantize", TINY, "out", "--method", "rtn", "--overwrite").exit_code == 0


def test_options_win_over_the_recipe(run, tmp_path):
    (tmp_path / "r.yaml").write_text("scheme: int8-channel\nmethod: rtn\nseed: 3\n")
    done = run("quantize", TINY, "out", "--recipe", "r.yaml", "--scheme", "int2-g32", "--json", "-")
    recipe = json.loads(done.stdout)["recipe"]
    assert (recipe["scheme"], recipe["method"], recipe["seed"]) == ("int2-g32", "rtn", 3)


def test_plan_names_every_linear_and_runs_nothing(run, tmp_path):
    same = ["--samples", "128", "--strict", "--work", "w", "--seed", "1", "--max-shard-size", "1GB"]
    done = run("plan", TINY, "--scheme", "int3-g64", *same, "--json", "p.json")
    assert done.exit_code == 0, done.output
    for part in ("{0-3}", "q_proj", "down_proj", "int3-g64", "peak memory", "disk", "time"):
        assert part in done.output
    plan = json.loads((tmp_path / "p.json").read_text())
    assert len(plan["rows"]) == 28
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.json"]


def test_eval_prints_a_table_and_notes_it_in_the_card(run, quantized, tmp_path):
    shutil.copytree(quantized, tmp_path / "out")
    done = run("eval", TINY, "out", "--windows", "2", "--length", "128", "--json", "e.json")
    assert done.exit_code == 0, done.output
    scores = json.loads((tmp_path / "e.json").read_text())
    assert 0 < scores["kl_mean"] < 0.1
    assert f"{scores['kl_mean']:.5f}" in done.output
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{scores['kl_mean']:.4f}" in card
    before = card
    run("eval", TINY, "out", "--windows", "1", "--length", "128", "--no-card")
    assert (tmp_path / "out" / "README.md").read_text() == before


def test_inspect_any_checkpoint(run, quantized):
    done = run("inspect", quantized, "--json", "-")
    content = json.loads(done.stdout)
    assert content["bits_per_weight"] == pytest.approx(4.25)
    assert content["report"]["recipe"]["method"] == "gptq"
    assert max(entry["error"] or 0 for entry in content["entries"]) > 0
    layers = json.loads((quantized / "config.json").read_text())["num_hidden_layers"]
    fused = f"{layers} of {layers} layers run in one call each; those fall back where gradients,"
    assert content["fused"].startswith(fused)
    assert content["fused"] in " ".join(run("inspect", quantized).output.split())
    plain = run("inspect", TINY)
    assert "float" in plain.output
    assert "bfloat16" in plain.output


def test_convert_there_and_back(run, quantized, tmp_path):
    there = run("convert", quantized, "gptq", "--format", "gptq")
    assert there.exit_code == 0, there.output
    assert there.output.strip().splitlines()[-1].endswith('from_pretrained("gptq")')
    assert run("convert", "gptq", "back", "--format", "compressed-tensors").exit_code == 0
    weights = [(p / "model.safetensors").read_bytes() for p in (quantized, tmp_path / "back")]
    assert weights[0] == weights[1]


def test_demo(run):
    done = run("demo", "shown")
    assert done.exit_code == 0, done.output
    for part in ("int3-g64 rtn", "int3-g64 gptq", "int4-g64 gptq", "KL mean"):
        assert part in done.output
    assert done.output.strip().splitlines()[-1].endswith('from_pretrained("shown")')


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["quantize", "nowhere", "out"], 2, "wanted a folder or a hub id"),
        (["quantize", TINY, "out", "--scheme", "int9-g64"], 3, "int1, int2"),
        (["quantize", TINY, "out", "--method", "magic"], 3, "rtn, gptq, awq, awq+gptq"),
        (["quantize", TINY, "out", "--format", "gguf"], 3, "compressed-tensors, gptq"),
        (["quantize", TINY, "out", "--scheme", "int4-g96"], 3, "would work"),
        (["quantize", TINY, "out", "--recipe", "no.yaml"], 2, "could not read no.yaml"),
        (["quantize", TINY, "out", "--calibration", "no.txt"], 2, "could not read the text file"),
        (["quantize", TINY, "out", "--max-shard-size", "many"], 2, "wanted a size like 5GB"),
        (["quantize", TINY, "out", "--length", "100000"], 2, "windows of at most 512"),
        (["eval", TINY, "nowhere"], 2, "wanted a folder or a hub id"),
        (["convert", TINY, "out", "--format", "gptq"], 2, "wanted a quantized checkpoint"),
        (["inspect", "."], 2, "wanted a folder with a config.json"),
        (["convert", TINY, "out", "--format", "gguf"], 3, "compressed-tensors, gptq"),
        (["quantize", TINY, "out", "--json", "no/x.json"], 2, "a folder that is there"),
        (["quantize", TINY, "out", "--chat"], 2, "wanted rows to put into the chat template"),
        (["quantize", TINY, "out", "--method", "rtn", "--calibration", "no.txt"], 2, "no.txt"),
        (
            ["quantize", TINY, "/proc/none/out", "--method", "rtn"],
            2,
            "could not use the work folder",
        ),
        (["plan", TINY, "--calibration", "no.txt"], 2, "could not read the text file no.txt"),
        (["eval", TINY, TINY, "--windows", "1", "--length", "600"], 2, "windows of at most 512"),
    ],
)
def test_wrong_input_is_one_sentence_and_an_exit_code(run, tmp_path, arguments, code, said):
    done = run(*arguments)
    assert done.exit_code == code, done.output
    assert said in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("error", "code"), [(NumericalError("x"), 4), (VerificationError("x"), 5)])
def test_exit_codes_of_failures(run, monkeypatch, error, code):
    def fail(*_args, **_keywords):
        raise error

    monkeypatch.setattr("bitwright.pipeline.quantize", fail)
    assert run("quantize", TINY, "out").exit_code == code


def test_ctrl_c_ends_cleanly_and_says_how_to_resume(tmp_path):
    command = [sys.executable, "-m", "bitwright", "quantize", TINY, "out", "--quiet"]
    # a shell's background jobs ignore SIGINT, and so would their children
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    while not (tmp_path / "out.work" / "linears").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == cli.INTERRUPTED
    assert "the same command goes on from what lies in out.work" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.work" / "fingerprint.json").exists()


@pytest.mark.parametrize(("text", "count"), [("5GB", 5 * 10**9), ("1.5M", 1500000), ("77", 77)])
def test_sizes(text, count):
    assert options.byte_count(text) == count


@pytest.mark.parametrize("arguments", [["--help"], ["quantize", "--help"]])
def test_help_waits_for_no_heavy_library(arguments):
    """No NumPy, torch or transformers: help comes in a third of a second, not in four."""
    program = (
        "import sys\nfrom bitwright import launch\nsys.argv[1:] = sys.argv[2:]\n"
        "heavy = 'numpy', 'torch', 'transformers', 'greenlet', 'huggingface_hub'\n"
        "try:\n    launch.main()\nfinally:\n    print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "-", *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("[]")
    assert "Usage: bitwright" in done.stdout
