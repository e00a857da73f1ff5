"""What is multiplied in what: the forward's float32 products, and the Gram sums of bf16 inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitwright import module, ops
from bitwright.calib import precision
from bitwright.calib.stats import StatsCollector
from bitwright.demo import embedded_model
from bitwright.spec import InputError
from problems import inputs


@pytest.fixture(autouse=True)
def _fresh():
    precision.choice.cache_clear()
    yield
    precision.choice.cache_clear()


@pytest.mark.parametrize(("error", "inside"), [(9e-7, "medium"), (2e-6, "highest")])
def test_the_setting_is_chosen_by_its_error_and_restored(monkeypatch, error, inside):
    monkeypatch.setattr(precision, "_error", lambda: error)
    assert torch.get_float32_matmul_precision() == "highest"
    with precision.products("float32"):
        assert torch.get_float32_matmul_precision() == inside
    with pytest.raises(ZeroDivisionError), precision.products("float32"):
        _ = 1 / 0
    with precision.products("bfloat16"):
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_chosen_setting_multiplies_in_float32():
    """At other shapes than the probe's, an error of float32 sums and not of bf16 products."""
    X, W = torch.from_numpy(inputs(700, 300)), torch.from_numpy(inputs(90, 300, 1))
    with precision.products("float32"):
        found = torch.nn.functional.linear(X, W)
    size = X.abs().double() @ W.abs().double().T
    assert ((found - X.double() @ W.double().T).abs() / size).max() <= precision.LIMIT


def test_the_probe_tells_bf16_products(monkeypatch):
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, W: linear(x.bfloat16(), W.bfloat16()).float()
    )
    assert precision._error() > 10 * precision.LIMIT


def test_the_dtype_of_gram_products_is_an_option_and_recorded(tmp_path):
    wish = {"samples": 2, "length": 64, "effort": "fast", "scheme": "int4-g64"}
    found = {}
    for name, options in (("auto", {}), ("float32", {"gram_dtype": "float32"})):
        report = module.quantize(
            embedded_model(), out=tmp_path / name, dtype="bfloat16", options=options, **wish
        )
        found[name] = report.to_dict()["gram_dtype"]
    machine = "bfloat16" if ops.multiplies_bf16() else "float32"
    assert found == {"auto": machine, "float32": "float32"}
    with pytest.raises(
        InputError, match=r"\[sums\] wanted products of float32 or bfloat16 .*float3"
    ):
        module.quantize(
            embedded_model(),
            out=tmp_path / "no",
            dtype="float32",
            options={"gram_dtype": "bfloat16"},
            **wish,
        )
    with pytest.raises(InputError, match=r"gram_dtype must be auto, float32 or bfloat16, got 'x'"):
        module.quantize(embedded_model(), out=tmp_path / "no", options={"gram_dtype": "x"}, **wish)
    assert not (tmp_path / "no").exists()


def test_float32_products_of_bf16_are_those_of_the_widened_inputs():
    X = torch.from_numpy(inputs(600, 24)).bfloat16()
    wide, narrow = (StatsCollector(24, products="float32") for _ in range(2))
    first, second = wide.update(X.float()).finish(), narrow.update(X).finish()
    np.testing.assert_array_equal(first.H, second.H)
