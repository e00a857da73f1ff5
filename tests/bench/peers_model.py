"""A whole model at 4 bits in groups of 64 by llm-compressor, by GPTQModel and by us, in one run.

    python tests/bench/peers_model.py BASE [--samples 128] [--llmcompressor PYTHON]
                                           [--gptqmodel PYTHON] [--text FILE ...]

All get the same tokens of the shipped books, in windows of 512, and float32 weights on
the CPU; symmetric scales, everything else as each library ships it ("mse": with its search of
scales by mean square error). Each runs in a process of the interpreter that has it and writes its
own format; bitwright.compare scores what lies on the disk, on three texts (texts.py, or each FILE).
An interpreter that is not given is a line that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

BITS, GROUP, LENGTH = 4, 64, 512


def ours(base: str, ids: np.ndarray, out: str, effort: str) -> None:
    import bitwright

    bitwright.quantize(
        base, out=out, scheme=f"int{BITS}-g{GROUP}", effort=effort, calibration=ids, dtype="float32"
    )


def llmcompressor(base: str, ids: np.ndarray, out: str, observer: str) -> None:
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = {"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()}
    weights = QuantizationArgs(
        num_bits=BITS, type="int", symmetric=True, strategy="group", group_size=GROUP,
        **({"observer": observer} if observer else {}),
    )  # fmt: skip
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    oneshot(
        model=model, processor=tokenizer, dataset=Dataset.from_dict(rows),
        recipe=GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"]),
        max_seq_length=LENGTH, num_calibration_samples=len(ids), shuffle_calibration_samples=False,
    )  # fmt: skip
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)


def gptqmodel(base: str, ids: np.ndarray, out: str, mse: str) -> None:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # 7.7 refuses to start on two CPUs without
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=BITS, group_size=GROUP, sym=True, **({"mse": 2.4} if mse else {}))
    model = GPTQModel.load(base, config, device="cpu", dtype=torch.float32)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    model.quantize(rows, batch_size=1)
    model.save(out)


RUNS = {
    "bitwright fast": (ours, "fast"),
    "bitwright default": (ours, "default"),
    "llm-compressor": (llmcompressor, ""),
    "llm-compressor mse": (llmcompressor, "mse"),
    "GPTQModel": (gptqmodel, ""),
    "GPTQModel mse": (gptqmodel, "mse"),
}


def work(who: str, base: str, ids: str, out: str) -> None:
    run, setting = RUNS[who]
    begin = time.perf_counter()
    run(base, np.load(ids), out, setting)
    print("\n" + json.dumps(time.perf_counter() - begin))


def calibration(base: str, samples: int) -> np.ndarray:
    from bitwright.calib import data
    from bitwright.spec import Recipe

    tokenizer = data.load_tokenizer(Path(base))
    recipe = Recipe(samples=samples, length=LENGTH)
    return data.collect("books", tokenizer, recipe, len(tokenizer)).ids


def row(python: str, wish: tuple[str, str, str, str], folder: Path, texts: Any) -> str:
    """Of the table: `wish` is what `work` takes."""
    import bitwright

    who, base, _, out = wish
    command = [python, str(Path(__file__).resolve()), "--work", *wish]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"| {who} | {(done.stderr.strip().splitlines() or ['no word'])[-1]} | | | |"
    seconds = float(json.loads(done.stdout.strip().splitlines()[-1]))
    scores = [bitwright.compare(base, out, text=text) for text in texts]
    kl = ", ".join(f"{s.kl_mean:.4f}" for s in scores)
    first = scores[0]
    return (
        f"| {who} | {kl} | {first.perplexity:.2f} | {first.bits_per_weight:.2f} | {seconds:.0f} |"
    )


def main() -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--text", nargs="*")
    parser.add_argument("--only", default="")
    parser.add_argument("--llmcompressor", help="interpreter that has llm-compressor")
    parser.add_argument("--gptqmodel", help="interpreter that has GPTQModel")
    a = parser.parse_args()
    from texts import scored

    pythons: dict[Any, str | None] = {
        ours: sys.executable, llmcompressor: a.llmcompressor, gptqmodel: a.gptqmodel
    }  # fmt: skip
    print("| tool | KL: book, topics, code | perplexity | bits | seconds |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="bitwright-peers-") as scratch:
        folder = Path(scratch)
        ids = folder / "ids.npy"
        np.save(ids, calibration(a.base, a.samples))
        read = a.text or scored(folder)
        for who, (run, _) in RUNS.items():
            python = pythons[run]
            if python is None:
                print(f"| {who} | no interpreter given | | | |", flush=True)
            elif any(part in who for part in a.only.split(",")):
                wish = (who, str(Path(a.base).resolve()), str(ids), str(folder / who))
                print(row(python, wish, folder, read), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:])
    else:
        main()
