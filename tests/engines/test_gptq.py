"""GPTQModel, and transformers with optimum, load our GPTQ folders with the exact torch kernel.

They pin other versions of what we need, so they live in an environment of their own, whose Python
BITWRIGHT_GPTQ_PYTHON names (`pip install gptqmodel optimum` there). Imports take long, so one
process loads all folders, and one test judges what it says.

The kernel computes a weight in fp16 (one rounding), so that is what is compared, value by value;
logits against the float model with those weights: in float32 through transformers, in fp16 through
GPTQModel, which refuses float32; a bf16 model there computes in bf16.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_models
from bitwright.files.checkpoint import Checkpoint
from bitwright.formats.dense import dense
from engines.twins import NARROW, has_negative_scales, llama_of, our_weights, quantized, solved

PYTHON = os.environ.get("BITWRIGHT_GPTQ_PYTHON", "")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not PYTHON, reason="BITWRIGHT_GPTQ_PYTHON names no Python with gptqmodel"),
]

LIMITS = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 2e-2}
READER = Path(__file__).with_name("gptq_reader.py")
SKIP = [{"pattern": "*.mlp.gate_proj", "skip": True}]
WITHOUT_MLP = [{"pattern": "*.mlp.*", "skip": True}]
CASES: dict[str, dict[str, Any]] = {
    **{name: {"name": name, "scheme": "int4-g32"} for name in tiny_models.CONFIGS},
    **{
        f"int{bits}-{where}": {"scheme": f"int{bits}-{where}"}
        for bits in (2, 3, 4, 8)
        for where in ("g32", "g64-asym", "channel", "g128-asym")
    },
    "groups of 16": {"scheme": "int4-g16"},
    "tensor": {"scheme": "int8-tensor"},
    "long groups": {"scheme": "int4-g512"},
    "odd rows": {"scheme": "int4-channel", "changes": NARROW},
    "odd words": {"scheme": "int2-channel-asym", "changes": llama_of(80, 102)},
    "odd bytes": {"scheme": "int8-channel-asym", "changes": llama_of(80, 102)},
    "288 columns": {"scheme": "int3-g32-asym", "changes": {**llama_of(128, 288)}},
    "skip": {"scheme": "int4-g32", "overrides": SKIP},
    "skip, asymmetric": {"scheme": "int4-g32-asym", "overrides": SKIP},
    "attention alone": {"scheme": "int4-g32", "overrides": WITHOUT_MLP},
    "GPT-2 asymmetric": {"name": "gpt2", "scheme": "int3-g32-asym"},
    "bf16 model": {"scheme": "int4-g64", "dtype": "bfloat16"},
    "negative scales": {"scheme": "int4-g32", **solved()},
    "negative scales, 3 bits": {"scheme": "int3-channel", **solved()},
}
DTYPES = {"transformers": "float32", "gptqmodel": "float16"}
# What one of the two does not load, with the version that was run: (case, loader) -> its words.
UNREAD = {
    ("gpt2", "transformers"): ("5.24.", "has no attribute 'normal_'"),
    ("GPT-2 asymmetric", "transformers"): ("5.24.", "has no attribute 'normal_'"),
    ("phi3", "gptqmodel"): ("7.7.", "Missing required quantized weights"),
}


def prepare(case: str, folder: Path) -> dict[str, str]:
    """The float model, our folder, and the weights that we read in it."""
    wish = {"name": "llama", "format": "gptq", **CASES[case]}
    base, out = quantized(wish.pop("name"), folder, **wish)
    assert has_negative_scales(out) == case.startswith("negative")
    np.savez(folder / "weights.npz", **our_weights(dense(Checkpoint(out))))
    return {"base": str(base), "out": str(out), "weights": str(folder / "weights.npz")}


def jobs(root: Path) -> Iterator[dict[str, str]]:
    for i, case in enumerate(CASES):
        folder = root / str(i)
        folder.mkdir()
        paths = prepare(case, folder)
        for loader, dtype in DTYPES.items():
            kind = "bfloat16" if (case, loader) == ("bf16 model", "gptqmodel") else dtype
            yield {"id": f"{case}/{loader}", "loader": loader, "dtype": kind, **paths}


def read(work: list[dict[str, str]], root: Path) -> dict[str, Any]:
    """What the readers say of every job."""
    (root / "jobs.json").write_text(json.dumps(work))
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(
        [PYTHON, str(READER), str(root / "jobs.json"), str(root / "results.json")],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads((root / "results.json").read_text())
    return found


def problem(job: dict[str, str], result: dict[str, Any], versions: dict[str, str]) -> str:
    """What is wrong with a result; "" for a good one."""
    case, loader = job["id"].rsplit("/", 1)
    release, words = UNREAD.get((case, loader), ("", ""))
    if words and versions[loader].startswith(release):
        return "" if words in result.get("error", "") else f"not {words!r}: {result}"
    if "error" in result:
        return "" if words else str(result["error"])
    good = result["differing"] == 0 and result["logits"] < LIMITS[job["dtype"]] and result["text"]
    return "" if good else str(result)


@pytest.mark.slow
def test_both_readers_read_what_we_meant(tmp_path):
    """Every weight, logits and four generated words; and what the notes say is not read, is not."""
    work = list(jobs(tmp_path))
    results = read(work, tmp_path)
    problems = {job["id"]: problem(job, results[job["id"]], results["versions"]) for job in work}
    assert len(problems) == 2 * len(CASES)
    assert {key: text for key, text in problems.items() if text} == {}, results["versions"]
