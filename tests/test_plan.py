"""The plan: each linear's scheme, what is noted, what does not fit; nothing is read or written."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count

import pytest
import transformers

import bitwright
import tiny_models
from bitwright import ops, plan, schemes, trial
from bitwright import recipe as recipes
from bitwright.calib import memory
from bitwright.demo import embedded_model
from bitwright.job import open_job, outline_job
from bitwright.sizes import Sizes
from bitwright.spec import InputError, Override, Recipe, RefusedError

LLAMA3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
PHI35_MINI = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 131072,
    "pad_token_id": 32000,
}
SHAPES = {
    "LlamaConfig": (LLAMA3_8B, 8.03e9),
    "Qwen3Config": (QWEN3_4B, 4.02e9),
    "Phi3Config": (PHI35_MINI, 3.82e9),
}


@pytest.fixture
def steady(monkeypatch):
    """A machine that does not waver: a second passes at each look at the clock."""
    ticks = count()
    monkeypatch.setattr(trial, "perf_counter", lambda: float(next(ticks)))


@pytest.fixture(autouse=True)
def untimed(request, monkeypatch):
    """Nothing is measured but by a test that wants a steady machine."""
    if "steady" not in request.fixturenames:
        monkeypatch.setattr(plan.Estimate, "seconds", lambda _: {"forward": 1.0})


def config(kind, options, folder):
    """A config.json of a transformers config class, without weights."""
    made = getattr(transformers, kind)(**options, dtype="bfloat16")
    name = kind.removesuffix("TextConfig").removesuffix("Config")
    made.architectures = [f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"]
    made.save_pretrained(folder)
    return folder / "config.json"


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


@pytest.mark.usefixtures("steady")
def test_more_tokens_need_more():
    few, many = make(samples=8, effort="fast"), make(samples=512, effort="fast")
    assert few.ram["block"] < many.ram["block"]
    assert few.disk_bytes < many.disk_bytes
    for phase in ("forward", "statistics"):
        assert many.parts[phase] == pytest.approx(64 * few.parts[phase])
    assert many.parts["solve"] == few.parts["solve"]
    assert many.seconds == pytest.approx(sum(many.parts.values()))
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
        (128, {}, 10),  # five of eight of 16 batches, more than 32768 tokens
        (32, {}, 4),  # all 4: fewer than 32768 tokens
        (512, {}, 40),
        (128, {"effort": "max"}, 16),
        (128, {"scheme": "int2-g64-asym"}, 10),
        (128, {"scheme": "int2-g64-asym", "options": {"compare": 2}}, 8),
        (128, {"options": {"compare": 1.5}}, 11),
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


@pytest.mark.parametrize("name", ["llama", "llama-tied", "phi3", "gemma3", "gpt2", "opt-350m"])
def test_a_config_alone_plans_as_its_checkpoint(tmp_path, name):
    base = tiny_models.save(tiny_models.make(name), tmp_path / "base")
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_bytes((base / "config.json").read_bytes())
    wishes = {"scheme": "int4-g16", "samples": 4, "length": 16}
    wishes |= {"format": "gptq"} if name == "gpt2" else {}
    known = make(base, **wishes)
    for source in (alone, alone / "config.json"):
        told = make(source, **wishes)
        same = replace(told, ram_base=known.ram_base, ram_bytes=known.ram_bytes)
        assert same == known
        assert told.ram_bytes - told.ram_base == known.ram_bytes - known.ram_base


def test_a_config_under_another_name_and_of_another_dtype(tmp_path):
    path = config("LlamaConfig", tiny_models.COMMON, tmp_path).rename(tmp_path / "tiny.json")
    short = make(path, scheme="int4-g16", length=16)
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "dtype": "float32"}))
    assert make(path, scheme="int4-g16", length=16).output_bytes > short.output_bytes
    told.pop("dtype")
    path.write_text(json.dumps(told))
    assert make(path, scheme="int4-g16", length=16).output_bytes == short.output_bytes


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("{", InputError, "could not read"),
        ("[]", InputError, "wanted a JSON object"),
        ("{}", InputError, "that transformers knows"),
        ('{"model_type": "llama", "dtype": "int8"}', InputError, "as dtype of"),
        ('{"model_type": "vit"}', InputError, "that transformers can build"),
        (
            '{"model_type": "llama", "quantization_config": {"quant_method": "x"}}',
            InputError,
            "already quantized",
        ),
        ('{"model_type": "llama", "num_hidden_layers": 0}', RefusedError, "list of decoder layers"),
    ],
)
def test_a_config_that_is_none_is_told_in_one_sentence(tmp_path, content, error, message):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(error, match=message) as told:
        make(path)
    assert "\n" not in str(told.value)


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize("effort", ["fast", "default"])
@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_every_architecture_is_timed_by_its_config(tmp_path, name, effort):
    kind, options = tiny_models.CONFIGS[name]
    wishes = {"scheme": "int4-g16", "effort": effort, "samples": 4, "length": 16}
    recipe = recipes.from_dict({**wishes, "format": "bitwright"})
    job = outline_job(config(kind, options, tmp_path), recipe, dtype="float32")
    once, again = (plan.Estimate(job, Sizes(job), rerun).seconds() for rerun in (False, True))
    assert set(once) == {"forward", "statistics", "solve", "read", "save", "write"}
    assert all(seconds >= 0.0 for seconds in once.values())
    assert 0.0 < once["forward"] < again["forward"]
    assert once["statistics"] == again["statistics"] > 0.0
    assert all(slot.meta.is_meta for slot in job.skeleton.slots.values())
    for block in job.skeleton.blocks:
        assert not any("forward" in vars(module) for module in block.modules())


@pytest.mark.parametrize("kind", SHAPES)
def test_models_that_nobody_has_here(tmp_path, kind):
    """All weights of the published sizes, none of them made; every group has its bytes."""
    options, weights = SHAPES[kind]
    job = outline_job(config(kind, options, tmp_path), Recipe(length=2048), dtype="bfloat16")
    assert job.checkpoint.total_bytes / 2 == pytest.approx(weights, rel=0.005)
    stages = Sizes(job).stages(rerun=True)
    largest = 2 * options["vocab_size"] * options["hidden_size"]
    assert stages["write"] == pytest.approx(max(2 * largest, Sizes(job).rounding()))
    assert set(Sizes(job).groups(rerun=True)) == {group.label for group in job.arch.groups}
    assert all(slot.meta.is_meta for slot in job.skeleton.slots.values())


@pytest.mark.parametrize(
    ("effort", "most"),
    [("fast", 6.5e9), ("default", 10.08e9)],  # 7 and 10.5 GB, less Python and the libraries
)
def test_what_eight_billion_weights_need(tmp_path, effort, most):
    path = config("LlamaConfig", LLAMA3_8B, tmp_path)
    recipe = recipes.from_dict({"effort": effort, "samples": 128, "length": 2048})
    sizes = Sizes(outline_job(path, recipe, dtype="bfloat16"))
    stages = sizes.stages(rerun=True)
    k, n = 14336, 4096
    H = 14 * k**2 + 13 * n * k if effort == "fast" else 22 * k**2 + 20 * n * k
    hidden = int(sizes.streams * 128 * 2048 * 4096 * 2)
    assert stages["block"] == H + hidden + sizes.weights()
    assert max(stages.values()) < most


def test_q_and_k_in_turn_take_the_room_of_one_matrix(tmp_path):
    path = config("LlamaConfig", LLAMA3_8B, tmp_path)
    q, k, k2 = 4096 * 4096, 1024 * 4096, 4096**2

    def solving(**wishes):
        sizes = Sizes(outline_job(path, Recipe(length=2048, **wishes), dtype="bfloat16"))
        group = sizes.job.arch.groups[0]
        return sizes.solving(group) - sum(sizes.sums(group)) - 4 * k2

    assert solving() == 2 * k2 + 18 * (q + k)
    assert solving(options={"compare": 0}) == 4 * k2 + 13 * (q + k)
    assert solving(options={"coupled": False}) == 4 * k + 2 * k2 + 18 * q


@pytest.mark.usefixtures("steady")
def test_wider_is_longer(tmp_path):
    """A forward is per layer; a factor k^3, a row k^2 at most, beyond what is measured."""
    path = config("LlamaConfig", {**LLAMA3_8B, "num_hidden_layers": 2}, tmp_path)
    job = outline_job(path, Recipe(effort="fast", samples=2, length=32), dtype="float32")
    estimate = plan.Estimate(job, Sizes(job), rerun=False)
    asked = []
    estimate._tried = lambda k, *_: asked.append(k) or trial.Solved(1.0, 0.5, 0.25)
    up, down = (next(t for t in job.targets.values() if name in t.name) for name in ("up", "down"))
    found, larger = estimate._solved(job.arch.groups[-1], down), 14336 / 4096
    assert found == trial.Solved(larger**3, 0.5 * larger**2, 0.25 * larger**2)
    assert estimate._solved(job.arch.groups[-2], up) == trial.Solved(1.0, 0.5, 0.25)
    assert asked == [4096, 4096]


def test_a_row_costs_the_difference_of_many_and_few(monkeypatch):
    """What every solve does once is no row's; rows of a matrix are told apart from it."""
    once, row = 3.0, 0.25
    spent = {n: once + row * n for n in (trial.FEW, trial.MANY)} | {0: 7.0}
    rows = []

    class Solver:
        @staticmethod
        def prepare(*_args, **_options):
            rows.append(0)

        @staticmethod
        def solve(W, _stats, scheme, **_options):
            rows.append(len(W))
            return ops.encode(W, *ops.fit(W, scheme), scheme), None

    def typical(work, *_args, **_options):
        work()
        return spent[rows[-1]]

    monkeypatch.setattr(trial, "typical", typical)
    monkeypatch.setattr(ops, "threads", lambda: 1)
    problem = trial.Problem(32, schemes.parse("int4-g16"), drift=False, added=False)
    assert trial.solving(Solver, {}, problem) == trial.Solved(7.0, once, row)


def test_freed_pages_are_given_back_above_the_ceiling(monkeypatch):
    given = []
    monkeypatch.setattr(memory, "trim", lambda: given.append(True))
    monkeypatch.setattr(memory, "resident_bytes", lambda: 100)
    for ceiling, trims in ((0, True), (-5, True), (99, True), (100, False), (101, False)):
        memory.Heap(ceiling).trim()
        assert given == [True] * trims, ceiling
        given.clear()


@pytest.mark.parametrize("rerun", [False, True])
def test_up_to_the_ceiling_a_run_may_keep_holes(rerun):
    """Above it the plan's peak has room for all that comes and goes."""
    job = open_job(embedded_model(), Recipe(samples=8, length=64))
    made, sizes = plan.make_for(job, memory=1 if rerun else None, timed=False), Sizes(job)
    assert made.rerun == rerun
    assert made.ram_passing == max(sizes.passing(rerun).values()) > 0
    ceiling = made.ram_bytes - made.ram_passing
    holes = 0 if rerun else memory.hole_bytes(job.arch, sizes.shape, sizes.batch, sizes.item)
    assert ceiling >= made.ram_base + sizes.weights() + holes


def test_a_run_keeps_to_the_ceiling_of_its_plan(tmp_path, monkeypatch):
    plans, ceilings, make = [], set(), plan.make_for
    monkeypatch.setattr(plan, "make_for", lambda *a, **k: plans.append(make(*a, **k)) or plans[-1])
    monkeypatch.setattr(memory.Heap, "trim", lambda self: ceilings.add(self.ceiling))
    bitwright.quantize(embedded_model(), out=tmp_path / "out", samples=2, length=64, effort="fast")
    assert ceilings == {plans[-1].ram_bytes - plans[-1].ram_passing}
