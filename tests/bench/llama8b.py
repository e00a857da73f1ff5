"""Blocks of Llama-3-8B's shapes with random weights: the plan beside a run.

    python tests/bench/llama8b.py make FOLDER    2 blocks, bf16, in several files
    python tests/bench/llama8b.py run FOLDER     plan, run, time and peak side by side
    python tests/bench/llama8b.py plan           the whole model, 128 x 2048 tokens, by its config

`make` holds one tensor at a time. `run` plans and quantizes in processes of their own, so that each
peak (VmHWM) is of one of them; calibration ids are random. The vocabulary may be smaller than the
model's 128256: it costs disk and nothing of the time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bitwright.files.checkpoint import write_checkpoint

HIDDEN, FFN, KV, BLOCKS, VOCABULARY = 4096, 14336, 1024, 32, 128256
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}
SHARD = 256 << 20
PLANNED = """
import json, sys
from bitwright import plan, recipe
source, wishes, memory = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
place = {key: wishes.pop(key, None) for key in ("dtype", "device")}
made = plan.make(source, recipe.from_dict(wishes), memory=memory or None, **place)
print(json.dumps(made.to_dict()))
"""
RUN = """
import json, sys
import numpy as np
import bitwright
source, wishes, memory, out = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
vocabulary = json.load(open(source + "/config.json"))["vocab_size"]
shape = (wishes.pop("samples"), wishes.pop("length"))
ids = np.random.default_rng(0).integers(0, vocabulary, shape)
report = bitwright.quantize(source, out=out, calibration=ids, memory=memory or None, **wishes)
print(json.dumps(report.to_dict(measured=True)))
"""


def config(blocks: int, vocabulary: int) -> dict[str, Any]:
    """config.json of so many blocks."""
    return {**CONFIG, "num_hidden_layers": blocks, "vocab_size": vocabulary}


def make(folder: Path, blocks: int, vocabulary: int) -> None:
    """Random weights, a tensor at a time, in files of at most SHARD bytes."""
    rng, dtype = np.random.default_rng(0), np.dtype(ml_dtypes.bfloat16)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, HIDDEN)}
    for i in range(blocks):
        for name, shape in LINEARS.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{norm}.weight"] = (HIDDEN,)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (vocabulary, HIDDEN)}

    def produce(name: str) -> np.ndarray:
        if len(shapes[name]) == 1:
            return np.ones(shapes[name], dtype)
        return (rng.standard_normal(shapes[name], np.float32) * 0.02).astype(dtype)

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(blocks, vocabulary), indent=2) + "\n")
    write_checkpoint(folder, {n: (dtype, s) for n, s in shapes.items()}, produce, SHARD)


def in_process(code: str, *arguments: object) -> dict[str, Any]:
    """What a process of its own prints last, as JSON."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def told(name: str, seconds: dict[str, float], total: float, peak: int, there: int) -> str:
    spent = ", ".join(f"{phase} {value:.0f}" for phase, value in seconds.items())
    on_device = f"  {there / 1e9:6.2f} GB on the GPU" if there else ""
    return f"{name:9} {total:7.0f} s  {peak / 1e9:6.2f} GB{on_device}  {spent}"


def run(folder: Path, wishes: dict[str, Any], memory: int) -> None:
    """The plan and the run, one under the other."""
    plan = in_process(PLANNED, folder, json.dumps(wishes), memory)
    print(json.dumps(wishes), "again for each group" if plan["rerun"] else "parked")
    print(
        told("planned", plan["parts"], plan["seconds"], plan["ram_bytes"], plan["device_bytes"]),
        flush=True,
    )
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        report = in_process(RUN, folder, json.dumps(wishes), memory, f"{out}/quantized")
    seconds = dict(report["seconds"])
    total = seconds.pop("total")
    print(told("measured", seconds, total, report["peak_rss"], report["peak_device"]))
    ratios = (total / plan["seconds"], report["peak_rss"] / plan["ram_bytes"])
    print("measured / planned: time {:.2f}, memory {:.2f}".format(*ratios), flush=True)


def plan_whole(wishes: dict[str, Any], memory: int) -> None:
    """Llama-3-8B by its config."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config(BLOCKS, VOCABULARY)))
        plan = in_process(PLANNED, path, json.dumps(wishes), memory)
    print(json.dumps(wishes), "again for each group" if plan["rerun"] else "parked")
    print(
        told("planned", plan["parts"], plan["seconds"], plan["ram_bytes"], plan["device_bytes"]),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("make", "run", "plan"))
    parser.add_argument("folder", type=Path, nargs="?", default=Path("llama8b"))
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--efforts", nargs="+", default=["fast", "default"])
    parser.add_argument("--memory", type=float, default=0.0, help="GB; 0: 80 %% of what is free")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the forward")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="of forward and sums")
    a = parser.parse_args()
    if a.what == "make":
        return make(a.folder, a.blocks, a.vocabulary)
    for effort in a.efforts:
        samples = a.samples or (16 if a.what == "run" else 128)
        wishes: dict[str, Any] = {"effort": effort, "samples": samples, "length": a.length}
        wishes |= {k: v for k in ("dtype", "device") if (v := getattr(a, k))}
        memory = int(a.memory * 1e9)
        run(a.folder, wishes, memory) if a.what == "run" else plan_whole(wishes, memory)
    return None


if __name__ == "__main__":
    main()
