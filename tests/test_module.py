"""The Python door: models in memory, plain modules, one matrix, progress, threads put back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import bitwright
import tiny_models
from bitwright import ops
from bitwright.demo import embedded_model
from bitwright.files.checkpoint import Checkpoint
from bitwright.formats.dense import dense
from bitwright.spec import InputError, RefusedError

IDS = np.random.default_rng(0).integers(3, tiny_models.VOCAB, (4, 16))
WISH = {"scheme": "int4-g16", "samples": 4, "length": 16, "dtype": "float32"}


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("name", ["llama-tied", "opt"])
def test_a_transformers_model_in_place_equals_its_checkpoint(tmp_path, name, method):
    model = tiny_models.make(name)
    out = tmp_path / "out"
    report = bitwright.quantize(model, out=out, calibration=IDS, method=method, **WISH)
    assert len(report.linears) == len(report.to_dict()["linears"])
    view = dense(Checkpoint(out))
    state = model.state_dict()
    for key in view.names():
        assert np.array_equal(state[key].numpy(), view.read(key)), key
    assert model(torch.from_numpy(IDS)).logits.isfinite().all()


def test_a_model_from_a_folder_brings_its_tokenizer():
    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.bfloat16)
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    report = bitwright.quantize(model, scheme="int3-g64", samples=4, length=64)
    assert "windows of old English prose, " in report.calibration
    after = model.model.layers[0].mlp.up_proj.weight
    assert after.dtype == torch.bfloat16
    assert not torch.equal(before, after)


class Net(nn.Module):
    """Two linears, one of them wide; not a transformers model."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(48, 80), nn.Linear(80, 8, bias=False)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def inputs():
    torch.manual_seed(1)
    return [torch.randn(64, 48) @ torch.randn(48, 48) for _ in range(4)]


def test_any_module_is_quantized_where_it_stands(net):
    batches = inputs()
    want = torch.cat([net(x) for x in batches]).detach()
    error = {}
    for method in ("rtn", "gptq"):
        torch.manual_seed(0)
        copy = Net()
        report = bitwright.quantize(copy, scheme="int3-g16", method=method, calibration=batches)
        assert [linear.name for linear in report.linears] == ["first", "second"]
        assert len(np.unique(copy.first.weight.detach().numpy()[0, :16])) <= 8
        error[method] = float(
            (torch.cat([copy(x) for x in batches]) - want).detach().square().sum()
        )
    assert error["gptq"] < error["rtn"]


def test_any_module_with_overrides(net):
    overrides = [{"pattern": "second", "skip": True}]
    report = bitwright.quantize(net, method="rtn", scheme="int4-g16", overrides=overrides)
    assert report.skipped == ("second",)


def test_what_a_plain_module_needs_is_said(net):
    with pytest.raises(InputError, match=r"wanted calibration=, an iterable of inputs of Net"):
        bitwright.quantize(net)
    with pytest.raises(RefusedError, match=r"whose norms absorb"):
        bitwright.quantize(net, method="awq", calibration=inputs())
    with pytest.raises(InputError, match=r"the input never arrived, at the input of first"):
        bitwright.quantize(net, scheme="int4-g16", calibration=[])
    with pytest.raises(
        RefusedError, match=r"wanted a checkpoint folder or a torch module, got int"
    ):
        bitwright.quantize(3)
    options = {"attention": 4, "alpha": 1.0, "damping": 0.1}
    with pytest.raises(InputError, match=r"options of a matrix on its own, got attention, alpha"):
        bitwright.quantize(net, scheme="int4-g16", calibration=inputs(), options=options)
    with pytest.raises(InputError, match=r"options of a matrix on its own, got coupled: they need"):
        bitwright.quantize_matrix(np.ones((4, 32)), np.eye(32), coupled=True)
    with pytest.raises(InputError, match=r"wanted out="):
        bitwright.quantize(embedded_model())


def test_threads_are_put_back(tmp_path):
    before = ops.threads(), torch.get_num_threads()
    base = tiny_models.save(tiny_models.make("llama"), tmp_path / "base")
    bitwright.quantize(base, out=tmp_path / "out", calibration=IDS, threads=3, **WISH)
    assert (ops.threads(), torch.get_num_threads()) == before


def test_the_pieces_on_their_own():
    rng = np.random.default_rng(0)
    X, W = rng.normal(size=(256, 64)), rng.normal(size=(24, 64)).astype(np.float32)
    X = (X @ rng.normal(size=(64, 64))).astype(np.float32)
    stats = bitwright.StatsCollector(64).update(X[:100]).update(torch.from_numpy(X[100:])).finish()
    q = bitwright.quantize_matrix(torch.from_numpy(W), stats.H, scheme="int3-g32")
    plain = bitwright.quantize_matrix(W, scheme="int3-g32")
    errors = [np.square(X @ (W - one.dequantize()).T).sum() for one in (q, plain)]
    assert errors[0] < 0.8 * errors[1]
    assert isinstance(q, bitwright.QTensor)
    assert bitwright.__version__


def test_public_names_are_there():
    for name in bitwright.__all__:
        assert getattr(bitwright, name) is not None
    assert set(dir(bitwright)) >= {"quantize", "quantize_matrix", "compare", "convert"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bitwright.nothing  # noqa: B018
