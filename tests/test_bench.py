"""`bitwright bench`: every op runs beside its rivals, what it reports is plausible, and what is not
here is said."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from typer.testing import CliRunner

from bitwright import cli, ops
from bitwright.bench import contests, measure, peaks, rivals
from bitwright.bench.contests import OURS, Problem, Rivals
from bitwright.spec import InputError
from problems import threads

K = 128
NOBODY = Rivals(None, None, None)
EVERYBODY = Rivals.find()


@pytest.fixture(scope="module")
def found():
    with threads(1):
        done = CliRunner().invoke(
            cli.app, ["bench", "--quick", "--k", str(K), "--threads", "2", "--json", "-"]
        )
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout), done.stderr


def test_json_has_every_op_at_every_thread_count(found):
    data, _ = found
    assert set(data) == {"machine", "load", "peaks", "times", "notes"}
    assert data["machine"]["isa"] == ops.isa()
    ours = {(t["op"], t["threads"]) for t in data["times"] if t["who"] == OURS}
    assert ours == {(op, n) for op in contests.NAMES for n in (1, 2)}
    for time in data["times"]:
        assert time["seconds"] > 0
        assert time["rate"] > 0
        assert (time["share"] is not None) == (time["who"] == OURS)


def test_shares_stay_below_the_peak(found):
    data, _ = found
    assert all(t["share"] <= 1.05 for t in data["times"] if t["who"] == OURS)
    for peak in data["peaks"]:
        assert 0.1 < peak["float64"] <= 1.3 * peak["float32"]
        assert peak["read"] > 0.1
        assert (peak["bfloat16"] is not None) == ops.isa().endswith("bf16")


def test_the_table_names_everything(found):
    _, table = found
    for word in (
        "of peak",
        "GFLOP/s",
        "GB/s",
        "ours / best",
        "1 thread",
        "2 threads",
        *contests.NAMES,
    ):
        assert word in table
    for who in ("torch", "OpenBLAS", "Eigen"):
        assert f"{who}: " in table


def test_missing_rivals_are_a_dash_and_a_note(monkeypatch):
    monkeypatch.setattr(contests.Rivals, "find", classmethod(lambda _: NOBODY))
    done = CliRunner().invoke(cli.app, ["bench", "--quick", "--k", "64", "--threads", "1"])
    assert done.exit_code == 0, done.output
    line = next(x for x in done.output.splitlines() if x.startswith("gram float32"))
    assert line.split()[-6:] == ["-"] * 6
    assert "OpenBLAS: not here" in done.output
    assert "Eigen: not here" in done.output
    assert "torch: not here" in done.output


def test_threads_and_precision_are_as_before():
    torch = pytest.importorskip("torch")
    torch.set_float32_matmul_precision("high")
    before = torch.get_num_threads()
    try:
        with threads(3):
            measure.run(64, 1, quick=True)
            assert ops.threads() == 3
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.get_num_threads() == before
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("options", [["--k", "10"], ["--k", "0"], ["--threads", "0"], ["--k", "x"]])
def test_wrong_options_are_one_sentence(options):
    done = CliRunner().invoke(cli.app, ["bench", "--quick", *options])
    assert done.exit_code == 2
    assert "Traceback" not in done.output


def test_few_columns_are_refused():
    with pytest.raises(InputError, match="at least 64 columns, got 63"):
        measure.run(63)


@pytest.mark.parametrize("name", [n for n in ("openblas", "eigen") if getattr(EVERYBODY, n)])
def test_rivals_do_the_same_algebra(name):
    rival, p = getattr(EVERYBODY, name), Problem.draw(64)
    H, out = np.zeros((64, 64), np.float32), np.empty((64, 64), np.float32)
    rival.gram(p.X, H)
    exact = p.X.astype(np.float64).T @ p.X
    size = np.abs(p.X.T.astype(np.float64)) @ np.abs(p.X)
    assert (np.abs(np.triu(H - exact)) <= 64 * 2.0**-24 * size).all()
    rival.product(p.W, p.X, out)
    np.testing.assert_allclose(out, p.W.astype(np.float64) @ p.X, atol=1e-5 * np.abs(p.X).max())
    damped = p.H + np.eye(64)
    lower = damped.copy()
    rival.cholesky(lower)
    L = np.triu(lower).T  # column-major for both
    np.testing.assert_allclose(L @ L.T, damped, rtol=1e-12, atol=1e-12 * np.abs(damped).max())


@pytest.mark.skipif(find_spec("scipy_openblas32") is None, reason="scipy-openblas32 is missing")
def test_openblas_solves_with_the_factor():
    blas, p = rivals.OpenBlas.find(), Problem.draw(64)
    for turned in (False, True):
        x = p.W.copy()
        blas.solve(p.R, x, turned)
        back = x.astype(np.float64) @ (p.R.T if turned else p.R)
        np.testing.assert_allclose(back, p.W, atol=1e-4)


def test_peaks_follow_the_threads():
    with threads(1):
        one = peaks.measure(quick=True)
    assert one.threads == 1
    assert one.bound("bfloat16") >= one.float32


def test_the_command_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'torch' else real(name, *a)\n"
        "sys.argv = ['bitwright', 'bench', '--quick', '--k', '64', '--threads', '1']\n"
        "from bitwright.launch import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch: not here" in done.stdout
