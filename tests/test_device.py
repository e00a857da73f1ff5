"""The forward and the sums on a GPU. Sums in torch are asked on the CPU as well; what needs a card
is skipped where torch has none."""

from __future__ import annotations

import json
import re
from functools import partial

import numpy as np
import pytest
import torch

import bitwright
import tiny_models
from bitwright import StatsCollector, plan
from bitwright.calib import device as devices
from bitwright.calib import precision
from bitwright.calib.device import CPU, DeviceSums
from bitwright.demo import embedded_model
from bitwright.fingerprint import fingerprint
from bitwright.job import Job, open_job
from bitwright.progress import Silent
from bitwright.spec import DeviceError, InputError, Recipe, RefusedError

GPU = torch.cuda.is_available()
on_gpu = pytest.mark.skipif(not GPU, reason="torch has no GPU here")
PLACES = ["cpu", *(["cuda"] if GPU else [])]
EPS = np.finfo(np.float32).eps
RNG = np.random.default_rng(0)
X, BEFORE = (RNG.normal(size=(3, 1300, 40)).astype(np.float32) for _ in range(2))
SUMS = tuple(RNG.normal(size=(1300, 24)).astype(np.float32) for _ in range(2))
SMALL = {"samples": 8, "length": 64, "scheme": "int4-g64"}
KINDS = ["llama", "gemma2", "gemma3", "gpt2", "phi3", "qwen3", "opt", "mistral"]


def stats(make, dtype=torch.float32, heads=0, **options):
    """Statistics of X drifted from BEFORE, two updates."""
    collector = StatsCollector(40, heads, **options, sums=make(40))
    for cut in (slice(0, 700), slice(700, 1300)):
        x, before = (torch.from_numpy(a[: heads or 1, cut]).to(dtype) for a in (X, BEFORE))
        stream = None if heads else tuple(torch.from_numpy(s[cut]).to(dtype) for s in SUMS)
        collector.update(*(a if heads else a[0] for a in (x, before)), stream)
    return collector.finish()


def near(got, want):
    """Equal up to the order in which float32 sums of 512 and float64 sums above were added."""
    size = np.abs(want).max() * np.ones_like(want)
    return bool((np.abs(got - want) <= 512 * EPS * size).all())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("heads", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sums_in_torch_are_the_cores(place, bfloat16, heads, dtype):
    make = partial(DeviceSums, device=torch.device(place), bfloat16=bfloat16)
    got = stats(make, dtype, heads, hold=True)
    want = stats(lambda _k: None, dtype, heads, hold=True, products="float32")
    assert got.tokens == want.tokens
    assert near(got.H, want.H)
    assert np.array_equal(got.H, np.swapaxes(got.H, -1, -2))
    assert near(got.C, want.C)
    assert near(got.held.H, want.held.H)
    assert got.held.share == want.held.share
    assert (got.D is None) == (want.D is None) == bool(heads)
    assert got.D is None or near(got.D, want.D)
    assert np.allclose(got.mean_abs, want.mean_abs, rtol=EPS)
    for name in ("abs_max", "minimum", "maximum"):
        assert np.array_equal(getattr(got, name), getattr(want, name))


def test_bad_inputs_are_named():
    make = partial(DeviceSums, 40, CPU)
    with pytest.raises(InputError, match="wanted inputs with 40 columns, got shape"):
        StatsCollector(40, sums=make()).update(torch.zeros(3, 39))
    with pytest.raises(InputError, match=r"wanted float32, float16 or bfloat16.*torch.int32"):
        StatsCollector(40, sums=make()).update(torch.zeros(3, 40, dtype=torch.int32))
    bad = torch.zeros(3, 40)
    bad[1, 7] = torch.nan
    with pytest.raises(InputError, match="NaN or infinity in column 7"):
        StatsCollector(40, sums=make()).update(bad).finish()
    with pytest.raises(InputError, match="at least one token"):
        StatsCollector(40, sums=make()).update(torch.zeros(0, 40)).finish()


@pytest.mark.parametrize("wish", ["tpu", "cuda:99", "meta", "mps", ""])
def test_a_device_that_is_not_there(wish):
    with pytest.raises(InputError, match=rf"wanted cpu or one of the \d+ CUDA.*{re.escape(wish)}"):
        devices.choose(wish)


def test_a_gpu_is_taken_where_there_is_one(monkeypatch):
    assert devices.choose("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.choose() == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert devices.choose() == torch.device("cuda")


def test_a_run_on_sums_in_torch(tmp_path, monkeypatch):
    """The whole recipe on torch's sums: the same errors but for rounding."""
    errors = {}
    for name in ("core", "torch"):
        if name == "torch":
            monkeypatch.setattr(Job, "sums_of", lambda job, k: DeviceSums(k, job.device))
        report = bitwright.quantize(
            embedded_model(), out=tmp_path / name, **SMALL, dtype="float32", device="cpu"
        )
        errors[name] = np.array([linear.error for linear in report.linears])
    assert np.abs(errors["torch"] / errors["core"] - 1).mean() < 0.02
    assert (report.device, report.peak_device) == ("cpu", 0)


def test_memory_that_runs_out_is_one_sentence(tmp_path):
    """What is finished stays, and the same call goes on from there."""
    out, begun = tmp_path / "out", []
    run = partial(bitwright.quantize, embedded_model(), out=out, **SMALL)

    class Full(Silent):
        def advance(self, steps: int = 1) -> None:
            begun.append(steps)
            if len(begun) == 40:
                raise torch.OutOfMemoryError(
                    "CUDA out of memory. Tried to allocate 2 MiB. GPU 0 has"
                )

    with pytest.raises(DeviceError, match=r"\[device\].*Tried to allocate 2 MiB\);.*--device cpu"):
        run(progress=Full())
    assert (tmp_path / "out.work").is_dir()
    run()
    again = tmp_path / "again"
    bitwright.quantize(embedded_model(), out=again, **SMALL)
    assert contents(out) == contents(again)


def test_evaluation_says_so_too(monkeypatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB. GPU 0 has")

    monkeypatch.setattr("bitwright.calib.skeleton.Skeleton.forward_block", full)
    with pytest.raises(DeviceError, match="wanted more memory than the GPU has left"):
        bitwright.compare(embedded_model(), embedded_model(), windows=1, length=16)


def test_modules_that_run_where_they_stand_are_not_moved():
    with pytest.raises(RefusedError, match="'cuda', got Sequential, which runs where it stands"):
        bitwright.quantize(torch.nn.Sequential(torch.nn.Linear(64, 8)), method="rtn", device="cuda")


def test_plain_rounding_has_no_device(monkeypatch):
    monkeypatch.setattr(devices, "choose", lambda _wish=None: torch.device("cuda"))
    assert open_job(embedded_model(), Recipe(method="rtn")).device == CPU


def contents(folder):
    """Files by name, but for the card, which names its folder."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "README.md")
    return {p.relative_to(folder): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = tiny_models.save(tiny_models.make(name), folder)
        return made[name]

    return get


@on_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_every_architecture_as_on_the_cpu(kind, method, checkpoints, tmp_path):
    if method != "gptq" and kind in ("gemma2", "gemma3", "opt"):
        pytest.skip("no need: norms are folded on the host")
    source = checkpoints(kind)
    ids = np.random.default_rng(0).integers(3, tiny_models.VOCAB, (16, 16))
    options = {"scheme": "int4-g16", "dtype": "float32", "calibration": ids, "method": method}
    options["format"] = "bitwright"
    found = {}
    for place in ("cpu", "cuda"):
        report = bitwright.quantize(source, out=tmp_path / place, device=place, **options)
        found[place] = np.array([linear.error for linear in report.linears])
        assert not report.fallbacks
    assert report.device == torch.cuda.get_device_name()
    assert np.abs(found["cuda"] / found["cpu"] - 1).mean() < 0.05
    scores = [bitwright.compare(source, tmp_path / "cuda", ids=ids, device=p) for p in PLACES]
    assert scores[0].kl_mean == pytest.approx(scores[1].kl_mean, rel=1e-3)
    assert scores[0].perplexity_base == pytest.approx(scores[1].perplexity_base, rel=1e-4)


@on_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_bytes_twice_and_with_blocks_run_again(dtype, tmp_path):
    runs, recipe = {}, Recipe(samples=8, length=64)
    for name, memory in (("a", None), ("b", None), ("again", "rerun")):
        with pytest.MonkeyPatch.context() as patch:
            if memory:
                patch.setattr(plan.devices, "free_bytes", lambda _device: 1)
            assert plan.make(embedded_model(), recipe).rerun == bool(memory)
            bitwright.quantize(embedded_model(), out=tmp_path / name, **SMALL, dtype=dtype)
        runs[name] = contents(tmp_path / name)
    assert runs["a"] == runs["b"] == runs["again"]


@on_gpu
def test_a_run_goes_on_there_but_not_elsewhere(tmp_path):
    out = tmp_path / "out"

    class Stop(Silent):
        left = 60

        def advance(self, steps: int = 1) -> None:
            self.left -= steps
            if self.left < 0:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bitwright.quantize(embedded_model(), out=out, **SMALL, progress=Stop())
    with pytest.raises(InputError, match="device"):
        bitwright.quantize(embedded_model(), out=out, **SMALL, device="cpu", dtype="bfloat16")
    bitwright.quantize(embedded_model(), out=out, **SMALL)
    bitwright.quantize(embedded_model(), out=tmp_path / "whole", **SMALL)
    assert contents(out) == contents(tmp_path / "whole")


@on_gpu
def test_the_plan_holds_on_the_card(tmp_path):
    recipe = Recipe(scheme="int4-g64", samples=64, length=256)
    made = plan.make(embedded_model(), recipe)
    assert made.device == torch.cuda.get_device_name()
    assert made.seconds > 0
    took = bitwright.quantize(embedded_model(), recipe, out=tmp_path / "out").peak_device
    assert 0.5 * made.device_bytes < took < 1.1 * made.device_bytes


@on_gpu
def test_ids_that_no_table_has_are_one_sentence():
    ids = np.full((2, 16), 10**6)
    with pytest.raises(InputError, match="ids up to 1000000"):
        bitwright.compare(embedded_model(), embedded_model(), ids=ids)
    torch.cuda.synchronize()


@on_gpu
def test_float32_stays_float32(tmp_path):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        report = bitwright.quantize(
            embedded_model(), out=tmp_path / "out", **SMALL, dtype="float32"
        )
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    on_cpu = bitwright.quantize(
        embedded_model(), out=tmp_path / "cpu", **SMALL, dtype="float32", device="cpu"
    )
    first = next(x for x in report.linears), next(x for x in on_cpu.linears)
    assert first[0].error == pytest.approx(first[1].error, rel=1e-4)


@on_gpu
def test_a_block_in_float32_is_that_of_the_cpu():
    """TF32 would be off by 1e-3."""
    ids, found = torch.arange(5, 69)[None], {}
    for place in PLACES:
        job = open_job(embedded_model(), Recipe(), dtype="float32", device=place)
        body = job.skeleton
        with precision.setting("high"), precision.products("float32", place), body.block(0):
            found[place] = body.forward_block(0, body.embed(ids)).cpu()
    off = (found["cuda"] - found["cpu"]).abs().max() / found["cpu"].abs().max()
    assert off <= 2e-5


def test_the_device_is_part_of_the_fingerprint():
    job = open_job(embedded_model(), Recipe(), device="cpu")
    assert fingerprint(job, None)["device"] == "cpu"
    assert json.loads(json.dumps(dict(fingerprint(job, None))))
