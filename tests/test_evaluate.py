"""KL and perplexity against what transformers' own logits give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import bitwright
import tiny_models
from bitwright import ops, registry
from bitwright.demo import embedded_model
from bitwright.files.checkpoint import Checkpoint
from bitwright.formats.dense import dense
from bitwright.progress import Silent
from bitwright.spec import InputError

IDS = np.random.default_rng(0).integers(3, tiny_models.VOCAB, (5, 24))


@torch.inference_mode()
def scores(base, quant, ids):
    """Mean, median KL, perplexities and agreement in plain torch, float64."""
    p, q = (m(torch.from_numpy(ids)).logits.double().log_softmax(-1) for m in (base, quant))
    kl = (p.exp() * (p - q)).sum(-1).flatten()
    following = torch.from_numpy(ids[:, 1:, None])
    ppl = [(-x[:, :-1].gather(-1, following).mean()).exp() for x in (p, q)]
    agree = (p.argmax(-1) == q.argmax(-1)).double().mean()
    return kl.mean(), kl.quantile(0.5), *ppl, agree


def model(folder, base):
    """The float model of `base` with the dequantized weights of `folder`."""
    made = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    view, state = dense(Checkpoint(folder)), made.state_dict()
    for name in view.names():
        state[name].copy_(torch.from_numpy(view.read(name).astype(np.float32)))
    return made


@pytest.mark.parametrize("fmt", registry.names("formats"))
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_equal_to_transformers_own_logits(tmp_path, name, fmt):
    base, out = tiny_models.save(tiny_models.make(name), tmp_path / "base"), tmp_path / "out"
    bitwright.quantize(base, out=out, scheme="int4-g16", method="rtn", format=fmt)
    e = bitwright.compare(base, out, ids=IDS)
    want = scores(model(base, base), model(out, base), IDS)
    got = (e.kl_mean, e.kl_median, e.perplexity_base, e.perplexity, e.top1)
    assert got == pytest.approx([float(w) for w in want], rel=1e-4)
    assert e.tokens == IDS.size
    assert e.bytes == Checkpoint(out).total_bytes


def test_torch_takes_no_more_threads_than_the_core():
    """A control group's quota is the core's number, torch counts CPUs."""
    seen, before = [], (ops.threads(), torch.get_num_threads())

    class Seen(Silent):
        def advance(self, n=1):  # noqa: ARG002
            seen.append((ops.threads(), torch.get_num_threads()))

    ids = np.arange(32).reshape(1, 32)
    try:
        for core, own, least in ((1, 3, 1), (3, 2, 2)):
            ops.set_threads(core)
            torch.set_num_threads(own)
            bitwright.compare(embedded_model(), embedded_model(), ids=ids, progress=Seen())
            assert set(seen) == {(least, least)}
            assert (ops.threads(), torch.get_num_threads()) == (core, own)
            seen.clear()
    finally:
        ops.set_threads(before[0])
        torch.set_num_threads(before[1])


def test_a_model_and_itself():
    e = bitwright.compare(embedded_model(), embedded_model(), windows=2, length=128)
    assert (e.kl_mean, e.kl_p99, e.top1) == (0.0, 0.0, 1.0)
    assert e.perplexity == e.perplexity_base
    assert e.bits_per_weight == 0


def test_the_first_consecutive_windows_of_the_text(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(bitwright.calib.data.validation_text()[:20000])
    tokenizer = bitwright.calib.data.load_tokenizer(embedded_model())
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"][: 3 * 64]
    options = {"windows": 3, "length": 64}
    by_text = bitwright.compare(embedded_model(), embedded_model(), text=text, **options)
    by_ids = bitwright.compare(embedded_model(), embedded_model(), ids=np.reshape(ids, (3, 64)))
    assert by_text.perplexity == by_ids.perplexity


def test_what_cannot_be_compared(tmp_path):
    (tmp_path / "short.txt").write_text("A short text.")
    tiny = embedded_model()
    with pytest.raises(InputError, match=r"wanted 12 windows of 512 = 6144 tokens, the text has"):
        bitwright.compare(tiny, tiny, text=tmp_path / "short.txt")
    with pytest.raises(InputError, match=r"could not read the text"):
        bitwright.compare(tiny, tiny, text=tmp_path / "nowhere.txt")
    other = tiny_models.save(tiny_models.make("llama"), tmp_path / "other")
    with pytest.raises(InputError, match=r"one vocabulary.* 4096 .* 96"):
        bitwright.compare(tiny, other, windows=1, length=16)
