"""How long the sums of a group live: drift is there for every matrix that asks, and gone after the
last of them, whichever linears an architecture fuses. q and k keep theirs, as v may read the same.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

import bitwright
import tiny_models
from bitwright.calib import attention
from bitwright.solvers import gptq
from bitwright.spec import Stats


@pytest.mark.parametrize("inputs", ["plain", "mixed", "unknown"])
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt", "gemma3"])
def test_drift_lives_until_its_last_matrix(monkeypatch, tmp_path, name, inputs) -> None:
    model = tiny_models.make(name)
    base = tiny_models.save(model, tmp_path / "base")
    ids = np.random.default_rng(0).integers(3, tiny_models.VOCAB, (4, 16))
    live = {}

    def watch(solve):
        @functools.wraps(solve)  # its options are read from its signature
        def watched(*given, last=False, **options):
            stats = next(one for one in given if isinstance(one, Stats))
            assert stats.C is not None
            live[id(stats)] = stats
            found = solve(*given, last=last, **options)
            assert (stats.C is None) == last
            return found

        return watched

    for solve in (gptq.solve, gptq.solve_in_turn):
        monkeypatch.setattr(gptq, solve.__name__, watch(solve))
    if inputs == "unknown":
        monkeypatch.setattr(attention, "mix", lambda *_: None)
    report = bitwright.quantize(
        base,
        out=tmp_path / "out",
        scheme="int4-g16",
        dtype="float32",
        calibration=ids,
        samples=4,
        length=16,
        format="bitwright",
        options={"attention": 0 if inputs == "plain" else 4, "compare": 1},
    )
    kept = [stats for stats in live.values() if stats.C is not None]
    assert len(kept) == (model.config.num_hidden_layers if inputs == "mixed" else 0)
    assert all(linear.alpha is not None for linear in report.linears)
    told = any("v has the plain Gram" in note for note in report.notes)
    assert told == (inputs == "unknown")
