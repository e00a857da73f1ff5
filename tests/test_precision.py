"""What is multiplied in what: the Gram sums of bf16 inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitwright import module, ops
from bitwright.calib.stats import StatsCollector
from bitwright.demo import embedded_model
from bitwright.spec import InputError
from problems import inputs


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
