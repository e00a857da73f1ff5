"""Quantized folders under the installed transformers: load, from_pretrained, pipeline, generate.

The reference is always the float model with the weights that the folder means (formats.dense).
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

import bitwright
import folders
import tiny_models
from bitwright import demo, hf
from bitwright.files.checkpoint import Checkpoint
from bitwright.spec import InputError
from folders import files, ids, logits, quant_linears

CLOSE = 1e-4


@pytest.mark.parametrize("name", [n for n in tiny_models.CONFIGS if n != "opt-350m"])
def test_every_architecture_by_both_ways(name, tmp_path):
    """load and from_pretrained: the dense model's logits; saved again, the same tensors."""
    source = folders.float_folder(name, tmp_path / "float")
    folder = folders.ours(source, tmp_path / "ours", "int4-g16-asym")
    want = folders.dense_logits(folder, ids())
    loaded = bitwright.load(folder, mode="exact")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    hf.set_mode(plain, "exact")
    assert quant_linears(loaded) == quant_linears(plain) != []
    assert torch.allclose(logits(loaded), want, atol=CLOSE, rtol=0)
    assert torch.equal(logits(plain), logits(loaded))
    for model, out in ((loaded, tmp_path / "a"), (plain, tmp_path / "b")):
        model.save_pretrained(out)
        assert files(out) == files(folder)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    hf.set_mode(again, "exact")
    assert torch.equal(logits(again), logits(loaded))


@pytest.mark.parametrize("fmt", ["bitwright", "compressed-tensors", "gptq"])
@pytest.mark.parametrize("scheme", ["int4-g16", "int8-channel-asym", "int2-g32"])
def test_all_formats_that_we_write(source, tmp_path, fmt, scheme):
    folder = folders.ours(source, tmp_path / "ours", scheme, fmt)
    want = folders.dense_logits(folder, ids())
    model = bitwright.load(folder, mode="exact")
    assert torch.allclose(logits(model), want, atol=CLOSE, rtol=0)
    model.save_pretrained(tmp_path / "saved")
    again = bitwright.load(tmp_path / "saved", mode="exact")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("fmt", ["bitwright", "compressed-tensors"])
def test_codes_are_read_a_few_rows_at_a_time(source, tmp_path, fmt, monkeypatch):
    """No matrix of codes is read as a whole."""
    folder = folders.ours(source, tmp_path / "ours", "int4-g16", fmt)
    want = bitwright.load(folder)
    asked = {"read": [], "rows": []}
    for way, names in asked.items():
        real = getattr(Checkpoint, way)

        def spy(self, name, real=real, names=names):
            names.append(name)
            return real(self, name)

        monkeypatch.setattr(Checkpoint, way, spy)
    monkeypatch.setattr(sys.modules["bitwright.ops.linear"], "PIECE", 1)
    model = bitwright.load(folder)
    ends = (".codes", ".weight_packed")
    assert len([name for name in asked["rows"] if name.endswith(ends)]) == 14
    assert not [name for name in asked["read"] if name.endswith(ends)]
    assert torch.equal(logits(model), logits(want))


@pytest.mark.parametrize("scheme", ["nf4-g32", "nvfp4", "int4-g32-offset", "int4-g16-offset-8x6"])
def test_schemes_that_only_our_format_has(source, tmp_path, scheme):
    folder = folders.ours(source, tmp_path / "ours", scheme)
    model = AutoModelForCausalLM.from_pretrained(folder)
    hf.set_mode(model, "exact")
    want = folders.dense_logits(folder, ids())
    assert torch.allclose(logits(model), want, atol=CLOSE, rtol=0)


def test_shards_overrides_and_what_stays_in_float(source, tmp_path):
    folder = folders.ours(
        source, tmp_path / "ours", "int4-g16", max_shard_size=20_000,
        overrides=[{"pattern": "*.down_proj", "scheme": "int8-channel"},
                   {"pattern": "*.layers.0.*.q_proj", "skip": True}],
    )  # fmt: skip
    assert len(Checkpoint(folder).files) > 2
    want = folders.dense_logits(folder, ids())
    for model in (bitwright.load(folder), AutoModelForCausalLM.from_pretrained(folder)):
        hf.set_mode(model, "exact")
        assert len(quant_linears(model)) == 13
        assert torch.allclose(logits(model), want, atol=CLOSE, rtol=0)
        model.save_pretrained(tmp_path / "saved", max_shard_size=20_000)
        assert len(Checkpoint(tmp_path / "saved").files) > 2
        assert files(tmp_path / "saved") == files(folder)
        shutil.rmtree(tmp_path / "saved")


def test_a_body_without_its_head(quantized):
    body = AutoModel.from_pretrained(quantized)
    assert len(quant_linears(body)) == 14
    hf.set_mode(body, "exact")
    whole = bitwright.load(quantized, mode="exact")
    with torch.no_grad():
        assert torch.equal(body(ids())[0], whole.model(ids())[0])


def test_on_the_fly_is_what_quantize_writes(source, quantized, tmp_path):
    """Data-free rounding while the loader reads; skip keeps linears in float."""
    config = hf.BitwrightConfig("int4-g16-asym", skip=["*.v_proj"])
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    assert len(quant_linears(model)) == 12
    config = hf.BitwrightConfig("int4-g16-asym")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    model.save_pretrained(tmp_path / "saved")
    assert files(tmp_path / "saved") == files(quantized)
    hf.set_mode(model, "exact")
    assert torch.equal(logits(model), logits(bitwright.load(quantized, mode="exact")))
    names = set(dict(model.named_parameters())) | set(dict(model.named_buffers()))
    assert not [name for name in names if name.endswith("_proj.weight")]


def test_settings_of_this_process_come_with_the_call(quantized):
    config = hf.BitwrightConfig(mode="exact", activations="token")
    with pytest.warns(UserWarning, match="loading attributes"):
        model = AutoModelForCausalLM.from_pretrained(quantized, quantization_config=config)
    layer = model.get_submodule(quant_linears(model)[0])
    assert (layer.mode, layer.activations, layer.scheme.name) == ("exact", "token", "int4-g16-asym")
    assert "mode" not in model.config.quantization_config.to_dict()


def test_the_dtype_of_everything_else(tmp_path):
    """The checkpoint's; what the caller says; scales keep the file's type."""
    half = tiny_models.make("llama").half()
    half.save_pretrained(tmp_path / "half")
    folder = folders.ours(tmp_path / "half", tmp_path / "ours", "int4-g16")
    assert bitwright.load(folder).dtype == torch.float32
    assert bitwright.load(folder, dtype="float16").dtype == torch.float16
    model = bitwright.load(folder, dtype=torch.bfloat16, mode="exact")
    assert model.dtype == torch.bfloat16
    want = folders.dense_logits(folder, ids())
    assert (logits(model).float() - want).abs().max() < 0.05 * want.abs().max()
    kept = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
    assert {t.dtype for n, t in kept.state_dict().items() if n.endswith(".scales")} == {
        torch.bfloat16
    }
    with pytest.raises(
        InputError, match="wanted a dtype of float32, bfloat16, float16, got 'int8'"
    ):
        bitwright.load(folder, dtype="int8")


def test_generation_with_a_cache_and_left_padding(quantized):
    """Greedy tokens are those of the model without a cache; a padded batch gives each row's."""
    model = bitwright.load(quantized, mode="exact")
    long, short = ids()[0, :9], ids()[1, :5]
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    alone = [model.generate(row[None], **settings)[0, len(row) :] for row in (long, short)]
    plain = model.generate(long[None], use_cache=False, **settings)[0, 9:]
    assert torch.equal(plain, alone[0])
    batch = torch.zeros((2, 9), dtype=torch.int64)
    batch[0], batch[1, 4:] = long, short
    mask = (torch.arange(9) >= torch.tensor([[0], [4]])).long()
    together = model.generate(batch, attention_mask=mask, **settings)[:, 9:]
    assert torch.equal(together, torch.stack(alone))


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    """The embedded model with its tokenizer, and a chat template."""
    folder = tmp_path_factory.mktemp("tiny") / "ours"
    folders.ours(demo.embedded_model(), folder, "int4-g32")
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_pipeline_and_chat_templates(speaking):
    tokenizer = AutoTokenizer.from_pretrained(speaking)
    settings = {"max_new_tokens": 6, "do_sample": False}
    told = pipeline("text-generation", model=str(speaking))
    assert quant_linears(told.model)
    (answer,) = told("The man", **settings)
    again = pipeline("text-generation", model=bitwright.load(speaking), tokenizer=tokenizer)
    assert again("The man", **settings) == [answer]
    messages = [{"role": "user", "content": "The man"}]
    chat = again(messages, **settings)[0]["generated_text"][-1]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    (same,) = again(text, return_full_text=False, **settings)
    assert chat == {"role": "assistant", "content": same["generated_text"]}


def test_a_whole_model_compiles_and_trains(quantized):
    model = bitwright.load(quantized, mode="exact")
    compiled = torch.compile(model.model.layers[0].mlp, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 3, 32)
    assert torch.equal(compiled(x), model.model.layers[0].mlp(x))
    embedded = model.get_input_embeddings()(ids()).detach().requires_grad_()
    model(inputs_embeds=embedded, labels=ids()).loss.backward()
    assert embedded.grad.abs().max() > 0


PEAK = """
import json, sys, threading, time
import numpy as np, torch, transformers
from pathlib import Path
import bitwright.hf as hf
import transformers.models.llama.modeling_llama
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

def anonymous():
    status = Path("/proc/self/status").read_text().split("RssAnon:")[1]
    return int(status.split()[0]) * 1024

source, how = sys.argv[1:]
q = hf.quantizer.quantize_matrix(np.ones((64, 64)), scheme="int4-g64")
hf.QuantLinear.of(q)(torch.ones(64))
start, peak, running = anonymous(), 0, True

def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
if how == "load":
    model = hf.load(source)
else:
    fly = {"quantization_config": hf.BitwrightConfig("int4-g64")} if how == "fly" else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(source, **fly)
running = False
thread.join()
panels = sum(m.panels.numel() for m in model.modules() if isinstance(m, hf.QuantLinear))
print(json.dumps({"peak": peak - start, "panels": panels}))
"""


def peak_of(folder: Path, how: str) -> dict:
    """What PEAK prints, in a process of its own; of one thread, since each packs a megabyte at a
    time. What transformers imports for a model is there before."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder), how],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_holds_the_packed_model_and_a_layer(tmp_path):
    """Ten blocks of 12.6 MB in float32; beside the packed ones no float model, no second copy.

    Memory of the process's own (RssAnon); mapped files of transformers' loader come and go."""
    model = tiny_models.make(
        "llama", hidden_size=512, intermediate_size=1024, num_hidden_layers=10,
        num_attention_heads=8, num_key_value_heads=8, head_dim=64,
    )  # fmt: skip
    source = tiny_models.save(model, tmp_path / "float")
    ours = folders.ours(source, tmp_path / "ours", "int4-g64")
    total = sum(p.numel() * 4 for p in model.model.layers.parameters())
    layer = 512 * 1024 * 4
    for how, folder, layers in (("load", ours, 2), ("stored", ours, 2), ("fly", source, 8)):
        told = peak_of(folder, how)
        assert told["panels"] < total / 6
        assert told["peak"] < 1.1 * told["panels"] + layers * layer, (how, told)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_of_matrices_that_are_most_of_the_model(tmp_path):
    """One block: the codes of a matrix as bytes would be 47 % of the panels, as stored 24 %."""
    model = tiny_models.make(
        "llama", hidden_size=2048, intermediate_size=8192, num_hidden_layers=1,
        num_attention_heads=16, num_key_value_heads=16, head_dim=128,
    )  # fmt: skip
    ours = folders.ours(tiny_models.save(model, tmp_path / "float"), tmp_path / "ours", "int4-g64")
    told = peak_of(ours, "load")
    assert told["panels"] > 30e6
    assert told["peak"] < 1.1 * told["panels"] + 5e6, told


UNKNOWN = """
import transformers, torch
transformers.logging.disable_progress_bar()
model = transformers.AutoModelForCausalLM.from_pretrained({folder!r})
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""


def test_without_the_import_transformers_warns_and_leaves_random_weights(quantized):
    """The README says so."""
    done = subprocess.run(
        [sys.executable, "-c", UNKNOWN.format(folder=str(quantized))],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["Linear"]
    assert "Unknown quantization type, got bitwright" in done.stderr
    assert "mlp.up_proj.weight" in done.stderr
    assert "MISSING" in done.stderr


def test_a_plain_import_of_the_package_loads_no_torch():
    code = (
        "import sys, bitwright; bitwright.parse_scheme('int4-g64'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
    assert "load" in dir(bitwright)


def test_linears_with_one_input_are_multiplied_together(quantized, monkeypatch):
    """Bit for bit what single calls give; q, k, v and gate, up are two calls of a block's seven."""
    model, calls = bitwright.load(quantized, fused=False), []
    for name in ("product", "products"):
        real = getattr(hf.shared, name)
        spy = partial(lambda real, *args: calls.append(0) or real(*args), real)
        monkeypatch.setattr(hf.shared, name, spy)
    together = logits(model)
    assert len(calls) == 2 * 2
    attention = model.model.layers[0].self_attn
    x = torch.randn(1, 3, 32)
    q = attention.q_proj(x)
    x.add_(1)  # what was made of x before does not hold any more
    v = attention.v_proj(x)
    alone = bitwright.load(quantized, fused=False)
    for module in alone.modules():
        module.shared = None
    assert torch.equal(together, logits(alone))
    assert torch.equal(v, alone.model.layers[0].self_attn.v_proj(x))
    assert not torch.equal(q, attention.q_proj(x))
    twin = copy.deepcopy(model)
    attention.q_proj.set_mode("exact")
    assert torch.equal(logits(twin), together)
    assert not torch.equal(logits(model), together)


def test_threads_that_share_a_model_get_their_own(quantized):
    model = bitwright.load(quantized)
    layer, xs = model.model.layers[0].self_attn, [torch.randn(1, 4, 32) for _ in range(4)]
    want = [[p(x) for p in (layer.q_proj, layer.k_proj, layer.v_proj)] for x in xs]
    wrong = []

    def run(i: int) -> None:
        for _ in range(200):
            got = [p(xs[i]) for p in (layer.q_proj, layer.k_proj, layer.v_proj)]
            wrong.extend(a for a, b in zip(got, want[i], strict=True) if not torch.equal(a, b))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore")  # of PEFT: of custom modules, and of transformers
def test_peft_trains_adapters_and_saves_them_alone(quantized, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    config._register_custom_module({hf.QuantLinear: peft.tuners.lora.Linear})
    torch.manual_seed(0)
    model = bitwright.load(quantized)
    adapted = peft.get_peft_model(model, config)
    step = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(8):
        loss = adapted(ids(), labels=ids()).loss
        step.zero_grad()
        loss.backward()
        step.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(bitwright.load(quantized), tmp_path, config=config)
    assert torch.allclose(logits(again), logits(adapted), atol=1e-5)
