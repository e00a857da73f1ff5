"""How arrays and threads arrive at the core: NumPy, torch and DLPack memory is viewed, not copied;
the GIL is released while an op runs; the floating-point mode of the process stays as it was.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
import time
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from bitwright import _core, ops
from bitwright.calib.stats import StatsCollector
from problems import inputs, threads
from test_boundary import CASES, INPUTS, OUTPUTS, K, X, same

MODULES = [
    importlib.import_module(f"bitwright.ops.{name}")  # some are hidden by an op of their name
    for name in ("block", "codes", "linear", "probe", "solve", "sums")
]


class Recorder:
    """Stands for _core and keeps the arrays that arrive there."""

    def __init__(self, core: Any) -> None:
        self.core, self.seen = core, []

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.core, name)

        def run(*arguments: Any) -> Any:
            self.seen += [x for x in arguments if isinstance(x, np.ndarray)]
            return function(*arguments)

        return function if isinstance(function, type) and name != "Packed" else run


# What comes back is a revised copy.
REVISED = {("refine", "codes"), ("refine", "scales"), ("chain", "x"), ("dot_chain", "x")}
# One zero point a group, stored as a byte, taken as a float like the offset that may stand there.
WIDENED = {(op, "zeros") for op in ("encode", "decode", "gptq", "refine", "qlinear", "pack_linear")}


@pytest.mark.parametrize(("op", "name"), sorted({*INPUTS, *OUTPUTS} - REVISED - WIDENED))
def test_contiguous_arrays_arrive_without_a_copy(op: str, name: str, monkeypatch: Any) -> None:
    core = Recorder(_core)
    for module in MODULES:
        monkeypatch.setattr(module, "_core", core)
    x = {**CASES[op].arrays, **(CASES[op].sums or {})}[name].copy()
    CASES[op](**{name: x})
    assert any(np.shares_memory(x, seen) for seen in core.seen)


@pytest.mark.parametrize("name", ["float32", "float64", "float16", "bfloat16"])
def test_torch_tensors_are_views(name: str) -> None:
    tensor = torch.linspace(-3, 3, 35).reshape(5, 7).to(getattr(torch, name)).requires_grad_()
    array = ops.as_numpy(tensor)
    assert array.dtype == np.dtype(getattr(ml_dtypes, name, name))
    assert array.ctypes.data == tensor.data_ptr()
    assert np.array_equal(array.astype(np.float64), tensor.detach().double().numpy())
    turned = ops.as_numpy(tensor.T)
    assert np.array_equal(turned, array.T)
    assert turned.ctypes.data == tensor.data_ptr()


class Exporter:
    """Any library's array: nothing but DLPack."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


def test_dlpack_objects_are_views() -> None:
    view = ops.as_numpy(Exporter(X))
    assert np.shares_memory(view, X)
    assert same(CASES["gram"](X=view), CASES["gram"]())
    assert ops.as_numpy(X) is X
    assert ops.as_numpy([[1.0, 2.0]]).shape == (1, 2)


def test_statistics_of_16_bit_tensors_are_those_of_their_values() -> None:
    tensor = torch.from_numpy(X).to(torch.bfloat16)
    a, b = StatsCollector(K).update(tensor[None]), StatsCollector(K).update(tensor.float())
    assert np.array_equal(a.finish().H, b.finish().H)


PROBE = """
import numpy as np, torch
def tiny():
    arrays = np.array([5e-324]), np.array([1e-45], np.float32)
    tensors = torch.tensor([5e-324], dtype=torch.float64), torch.tensor([1e-45])
    return [bool((x * 1 != 0).all()) for x in (*arrays, *tensors)] + [5e-324 * 1.0 != 0.0]
before = tiny()
import bitwright
from bitwright import _core, ops
ops.set_threads(3)
ops.gram(np.ones((600, 70), np.float32), np.zeros((70, 70)))
assert before == tiny() == [True] * 5, (before, tiny())
"""


def test_import_keeps_subnormal_numbers() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_other_threads_run_while_an_op_does() -> None:
    """The GIL is released: a thread that wakes every half millisecond gets on meanwhile."""
    big, ticks = inputs(2048, 768), 0
    worker = threading.Thread(target=lambda: ops.gram(big, np.zeros((768, 768))))
    worker.start()
    while worker.is_alive():
        time.sleep(0.0005)
        ticks += 1
    assert ticks > 5


def test_calls_from_many_threads_give_the_same_bytes() -> None:
    big = inputs(700, 130)
    want = np.zeros((130, 130))
    ops.gram(big, want)
    sums = np.zeros((6, 130, 130))
    with threads(2):
        workers = [threading.Thread(target=ops.gram, args=(big, H)) for H in sums]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert all(np.array_equal(np.triu(H), np.triu(want)) for H in sums)
