"""Input that cannot be used: one sentence, and nothing left that stands in the way of the next
try.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import bitwright
import tiny_models
from bitwright import inspection
from bitwright.demo import embedded_model
from bitwright.spec import DiskError, InputError, RefusedError

IDS = np.random.default_rng(0).integers(3, tiny_models.VOCAB, (4, 16))


@pytest.fixture
def base(tmp_path):
    return tiny_models.save(tiny_models.make("llama"), tmp_path / "base")


def quantize(base, out, **wishes):
    keywords = {"scheme": "int4-g16", "calibration": IDS, "dtype": "float32", **wishes}
    return bitwright.quantize(base, out=out, **keywords)


def configured(base, **changes):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("part", ["model.norm", "model.embed_tokens", "lm_head"])
def test_tensors_that_are_only_copied_must_be_finite_too(tmp_path, part, method):
    model = tiny_models.make("llama")
    with torch.no_grad():
        model.get_parameter(f"{part}.weight").view(-1)[5] = np.nan
    base = tiny_models.save(model, tmp_path / "base")
    with pytest.raises(InputError, match=rf"NaN or infinity in {part}\.weight"):
        quantize(base, tmp_path / "out", method=method)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_the_corrected_command_is_not_held_up(base, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"order must be gar, act or natural, got 'banana'"):
        quantize(base, out, options={"order": "banana"})
    assert not (tmp_path / "out.work").exists()
    quantize(base, out)


def test_a_full_disk_leaves_what_is_finished(base, tmp_path, monkeypatch):
    def full(*_args):
        raise DiskError("[write] could not write x: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("bitwright.spool.Spool.save_hidden", full)
        with pytest.raises(DiskError):
            quantize(base, tmp_path / "out")
    assert (tmp_path / "out.work").exists()
    quantize(base, tmp_path / "out")


def test_quantization_configs_of_any_kind(base, tmp_path):
    configured(base, quantization_config=None)
    quantize(base, tmp_path / "out", method="rtn")
    configured(base, quantization_config="gptq")
    with pytest.raises(InputError, match=r"wanted an object as quantization_config"):
        quantize(base, tmp_path / "again", method="rtn")


def test_blocks_that_the_config_does_not_count(base, tmp_path):
    configured(base, num_hidden_layers=1)
    with pytest.raises(InputError, match=r"wanted 1 blocks as the config says, got .*layers\.1\."):
        quantize(base, tmp_path / "out", method="rtn")


@pytest.mark.parametrize("method", ["awq", "awq+gptq"])
def test_awq_over_a_table_is_refused_before_anything_runs(base, tmp_path, method):
    out = tmp_path / "out"
    with pytest.raises(
        RefusedError, match=r"nf4-g16 is no plain integer scheme, AWQ's searches want one"
    ):
        quantize(base, out, scheme="nf4-g16", method=method, format="bitwright")
    assert not out.with_name("out.work").exists()


def test_a_recipe_that_skips_everything(base, tmp_path):
    with pytest.raises(RefusedError, match=r"at least one linear"):
        quantize(base, tmp_path / "out", overrides=[{"pattern": "*", "skip": True}])


def test_ragged_ids_and_paths_below_a_file(base, tmp_path):
    with pytest.raises(InputError, match="ragged"):
        quantize(base, tmp_path / "out", calibration=[[1, 2, 3], [1, 2]])
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"below the file"):
        quantize(base, tmp_path / "file" / "x" / "y")
    with pytest.raises(DiskError, match=r"could not use the work folder"):
        quantize(base, tmp_path / "out", work=tmp_path / "file")


def test_damaged_papers(base, tmp_path):
    quantize(base, tmp_path / "out", method="rtn")
    (tmp_path / "out" / "bitwright-report.json").write_text("{}")
    found = inspection.inspect(tmp_path / "out")
    assert found.bits_per_weight > 4
    assert "wanted a report" in found.damage
    work = tmp_path / "work"
    work.mkdir()
    (work / "fingerprint.json").write_text("{")
    with pytest.raises(InputError, match=r"is damaged; delete"):
        quantize(base, tmp_path / "again", work=work)


class Net(nn.Module):
    """Called by keyword, with dropout and a head."""

    def __init__(self):
        super().__init__()
        self.first, self.drop = nn.Linear(32, 32), nn.Dropout(0.5)
        self.second, self.lm_head = nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.lm_head(self.second(input=self.drop(self.first(input=x))))


def test_a_module_changes_whole_or_not_at_all():
    torch.manual_seed(0)
    net = Net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    batches = [torch.randn(64, 32)]
    with torch.no_grad():
        net.second.weight[0, 0] = np.nan
    with pytest.raises(InputError, match=r"NaN or infinity in second"):
        bitwright.quantize(net, scheme="int4-g16", method="rtn")
    assert torch.equal(net.first.weight, before["first.weight"])
    with torch.no_grad():
        net.second.weight[0, 0] = 0
    report = bitwright.quantize(net, scheme="int4-g16", calibration=batches)
    assert [one.name for one in report.linears] == ["first", "second"]
    assert torch.equal(net.lm_head.weight, before["lm_head.weight"])
    assert net.training
    assert net.drop.training


def test_a_hub_id_keeps_its_name(tmp_path, monkeypatch):
    folder = tmp_path / "snapshots" / "0123"
    shutil.copytree(embedded_model(), folder)
    monkeypatch.setattr("bitwright.module.resolve", lambda _: folder)
    report = bitwright.quantize("org/name", out=tmp_path / "out", method="rtn")
    assert report.base == "org/name"
    assert "base_model: org/name" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("missing", ["transformers", "torch"])
def test_a_missing_extra_is_one_sentence(missing):
    """When a command needs it; help does not."""
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from bitwright.launch import main; sys.argv[1:] = sys.argv[2:]; main()"
    )
    for arguments in (["plan", str(embedded_model())], ["--help"]):
        done = subprocess.run(
            [sys.executable, "-c", code, "-", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert "Traceback" not in done.stderr
        if arguments == ["--help"]:
            assert done.returncode == 0
        else:
            assert done.returncode != 0
            assert f'{missing} is missing: pip install "bitwright[hf]"' in done.stderr
