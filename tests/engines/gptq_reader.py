"""Run by the interpreter that has gptqmodel and optimum: loads folders, compares, reports as JSON.

    python gptq_reader.py JOBS RESULTS

JOBS: a list of {"id", "base", "out", "weights", "loader", "dtype"}: the float model, our folder, an
.npz with our weights as (out, in), "gptqmodel" or "transformers". Both with the exact torch kernel.
RESULTS: {"versions": {...}, id: {"differing", "logits", "text"} or {"error"}}. Imports nothing of
bitwright.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel
from transformers import AutoModelForCausalLM, GPTQConfig

IDS = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(1))


def load(job: dict[str, str], dtype: torch.dtype) -> Any:
    if job["loader"] == "gptqmodel":
        loaded = GPTQModel.load(job["out"], device="cpu", backend=BACKEND.TORCH, dtype=dtype)
        return loaded.model.eval()
    config = json.loads((Path(job["out"]) / "config.json").read_text())["quantization_config"]
    torch_kernel = GPTQConfig(bits=config["bits"], backend="torch")
    return AutoModelForCausalLM.from_pretrained(
        job["out"], dtype=dtype, quantization_config=torch_kernel
    ).eval()


def twin(job: dict[str, str], dtype: torch.dtype, weights: dict[str, torch.Tensor]) -> Any:
    """The float model with our weights."""
    model = AutoModelForCausalLM.from_pretrained(job["base"], dtype=dtype).eval()
    for name, value in weights.items():
        module = model.get_submodule(name)
        module.weight.copy_(value.T if type(module).__name__ == "Conv1D" else value)
    return model


@torch.no_grad()
def compare(job: dict[str, str]) -> dict[str, Any]:
    """The kernel rounds a weight once: to fp16, in a bf16 model of gptqmodel to bf16."""
    dtype = getattr(torch, job["dtype"])
    kernel = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    weights = {k: torch.from_numpy(v).to(kernel) for k, v in np.load(job["weights"]).items()}
    engine = load(job, dtype)
    models = (engine, twin(job, dtype, weights))
    found, wanted = (model(IDS).logits.float() for model in models)
    differing = 0
    for module, value in weights.items():
        got = engine.get_submodule(module).dequantize_weight().T
        differing += int((got.float() != value.float()).sum())
    text = [m.generate(IDS, max_new_tokens=4, do_sample=False).tolist() for m in models]
    return {
        "differing": differing,
        "logits": float((found - wanted).abs().max() / wanted.abs().max()),
        "text": text[0] == text[1],
    }


def attempt(job: dict[str, str]) -> dict[str, Any]:
    try:
        return compare(job)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    results: dict[str, Any] = {job["id"]: attempt(job) for job in jobs}
    results["versions"] = {name: version(name) for name in ("gptqmodel", "optimum", "transformers")}
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
