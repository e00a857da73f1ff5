"""A killed run goes on where it stopped and ends with the same bytes; a changed one is refused."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
import time

import numpy as np
import pytest
import torch

import bitwright
import resume_job
import tiny_models
from bitwright.demo import embedded_model
from bitwright.progress import Silent
from bitwright.spec import InputError

KILLS = 12
SEED = 20261125


@pytest.fixture(scope="module")
def server():
    """Starts runs in processes that need not import torch again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["resume_job", "bitwright.module"])
    return context


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def undisturbed(server, out, method):
    """Contents and seconds of a run that nobody kills, the shorter of two."""
    seconds = float("inf")
    for _ in range(2):
        shutil.rmtree(out, ignore_errors=True)
        begin = time.perf_counter()
        process = server.Process(target=resume_job.run, args=(str(out), method))
        process.start()
        process.join()
        assert process.exitcode == 0
        seconds = min(seconds, time.perf_counter() - begin)
    return contents(out), seconds


def killed(server, out, method, after):
    """Kills a run after that many seconds; False if it was done before."""
    process = server.Process(target=resume_job.run, args=(str(out), method))
    process.start()
    process.join(after)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_kill_at_random_points_and_resume(server, tmp_path, method):
    out, work = tmp_path / "out", tmp_path / "out.work"
    want, seconds = undisturbed(server, out, method)
    shutil.rmtree(out)
    rng = np.random.default_rng(SEED)
    landed, midway = 0, 0
    for kill in range(4 * KILLS):  # on a busy machine some come too late
        after = seconds * (kill % KILLS + rng.random()) / KILLS
        if killed(server, out, method, after):
            landed += 1
            midway += work.exists()
        if not out.exists():
            process = server.Process(target=resume_job.run, args=(str(out), method))
            process.start()
            process.join()
            assert process.exitcode == 0
        assert contents(out) == want, f"killed after {after:.3f} of {seconds:.3f} s"
        shutil.rmtree(work, ignore_errors=True)  # killed behind the rename: it is not needed
        shutil.rmtree(out)
        if landed >= 10 and midway >= 5:
            break
    assert landed >= 10
    assert midway >= 5


def test_a_run_killed_again_and_again_ends_the_same(server, tmp_path):
    out = tmp_path / "out"
    want, seconds = undisturbed(server, out, "gptq")
    shutil.rmtree(out)
    rng = np.random.default_rng(SEED)
    for attempt in range(100):
        if not killed(server, out, "gptq", seconds * (0.3 + 0.02 * attempt + 0.2 * rng.random())):
            break
    assert attempt > 0
    assert contents(out) == want


class Stop(Silent):
    """Interrupts after `steps` steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def advance(self, n: int = 1) -> None:
        self.steps -= n
        if self.steps < 0:
            raise KeyboardInterrupt


@pytest.fixture
def base(tmp_path):
    return tiny_models.save(tiny_models.make("llama"), tmp_path / "base")


IDS = np.random.default_rng(0).integers(3, tiny_models.VOCAB, (4, 16))
WISH = {"scheme": "int4-g16", "samples": 4, "length": 16}


def quantize(base, out, **changes):
    keywords = {"calibration": IDS, "dtype": "float32", "threads": 1, **WISH, **changes}
    return bitwright.quantize(base, out=out, **keywords)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "awq+gptq"])
@pytest.mark.parametrize("steps", [1, 3, 6])
def test_interrupted_after_some_steps(base, tmp_path, method, steps):
    out = tmp_path / "out"
    quantize(base, out, method=method)
    want = contents(out)
    shutil.rmtree(out)
    with pytest.raises(KeyboardInterrupt):
        quantize(base, out, method=method, progress=Stop(steps))
    assert not out.exists()
    assert (tmp_path / "out.work" / "fingerprint.json").exists()
    quantize(base, out, method=method)
    assert contents(out) == want


@pytest.mark.parametrize("name", ["llama", "phi3"])
@pytest.mark.parametrize("steps", [4, 9, 14])
def test_what_the_capture_found_is_told_after_a_resume(tmp_path, monkeypatch, name, steps):
    """Attention that nobody knows: v has the plain Gram from block 0 on. The report is among what
    is compared, and a fused projection is cut into the same stages."""
    base, out = tiny_models.save(tiny_models.make(name), tmp_path / "base"), tmp_path / "out"
    monkeypatch.setattr("bitwright.calib.attention.mix", lambda *_: None)
    quantize(base, out)
    want = contents(out)
    told = json.loads((out / "bitwright-report.json").read_text())["notes"]
    assert any("v has the plain Gram: model.layers.0 attends" in note for note in told)
    shutil.rmtree(out)
    with pytest.raises(KeyboardInterrupt):
        quantize(base, out, progress=Stop(steps))
    quantize(base, out)
    assert contents(out) == want


def test_what_is_finished_is_not_solved_again(base, tmp_path, monkeypatch):
    out, solved = tmp_path / "out", []
    gptq = bitwright.registry.get("solvers", "gptq")
    solve, solve_in_turn = gptq.solve, gptq.solve_in_turn

    def counting(W, *args, **keywords):
        solved.append(W.shape)
        return solve(W, *args, **keywords)

    def counting_in_turn(matrices, *args, **keywords):
        solved.extend(W.shape for W in matrices)
        return solve_in_turn(matrices, *args, **keywords)

    monkeypatch.setattr(gptq, "solve", counting)
    monkeypatch.setattr(gptq, "solve_in_turn", counting_in_turn)
    with pytest.raises(KeyboardInterrupt):
        quantize(base, out, progress=Stop(6))
    assert 0 < len(solved) < 14
    quantize(base, out)
    assert len(solved) == 14


def changed_weights(base):
    model = tiny_models.make("llama")
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    tiny_models.save(model, base)


def changed_config(base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))


CHANGES = {
    "recipe.scheme": {"scheme": "int3-g16"},
    "recipe.overrides": {"overrides": [{"pattern": "*.down_proj", "skip": True}]},
    "recipe.method": {"method": "awq+gptq"},
    "recipe.options": {"options": {"damping": 0.5}},
    "tokens": {"calibration": IDS[::-1].copy()},
    "threads": {"threads": 2},
    "dtype": {"dtype": "bfloat16"},
    "tensors.model.safetensors": changed_weights,
    "config": changed_config,
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_changed_run_is_refused_with_both_values(base, tmp_path, key):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(base, out, progress=Stop(4))
    stored = json.loads((tmp_path / "out.work" / "fingerprint.json").read_text())
    before = contents(tmp_path / "out.work")
    change = CHANGES[key]
    keywords = change if isinstance(change, dict) else {}
    if not keywords:
        change(base)
    with pytest.raises(InputError) as refused:
        quantize(base, out, **keywords)
    text = str(refused.value)
    assert f"{key} = {stored[key]}" in text
    assert text.count(f"{key} = ") == 2
    assert contents(tmp_path / "out.work") == before
    assert not out.exists()


def test_the_instruction_set_and_versions_are_part_of_it(base, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        quantize(base, tmp_path / "out", progress=Stop(4))
    monkeypatch.setattr("bitwright.ops.isa", lambda: "another")
    with pytest.raises(InputError, match=r"isa = \w+, this one has isa = another"):
        quantize(base, tmp_path / "out")
    stored = json.loads((tmp_path / "out.work" / "fingerprint.json").read_text())
    assert {"torch", "transformers", "bitwright", "batch", "threads", "dtype"} <= set(stored)
    assert {"matmul", "device"} <= set(stored)


def test_a_work_folder_that_is_not_ours(base, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    (work / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"wanted an empty work folder or one of ours"):
        quantize(base, tmp_path / "out", work=work)
    assert contents(work).keys() == {(work / "thesis.txt").relative_to(work)}


def test_killed_while_the_work_folder_was_made(base, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    (work / "fingerprint.json.part").write_text("{")
    quantize(base, tmp_path / "out", work=work)
    shutil.rmtree(work)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        quantize(base, tmp_path / "out", work=work, progress=Stop(1))
    shutil.rmtree(work / "linears")
    shutil.rmtree(work / "norms")
    quantize(base, tmp_path / "out", work=work)


def test_a_work_folder_of_ones_own_is_kept(base, tmp_path):
    quantize(base, tmp_path / "out", work=tmp_path / "work")
    assert (tmp_path / "work" / "fingerprint.json").exists()


def test_the_embedded_model_is_whole():
    assert (embedded_model() / "model.safetensors").stat().st_size > 10**7
