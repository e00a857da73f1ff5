"""Our GPTQ solve beside those of llm-compressor and GPTQModel, called as functions on the CPU.

python tests/bench/peers.py [--k 4096 2048] [--threads 1 2] [--rounds 2]
                            [--llmcompressor PYTHON] [--gptqmodel PYTHON]

The same W and the same inputs for all, 4 bits in groups of 128, symmetric, each solver as its
library would run it: factorisation included, statistics and the choice of scales too where they are
part of its solve (ours, GPTQModel), llm-compressor on absmax scales made before. "with errors": as
in a run, whose report compares each matrix with plain rounding; the others do not. Each runs in a
process of the interpreter that has it, in turn, `rounds` times; the least seconds count. Printed
beside the time is the layer's error, tr(E H E^T) / tr(W H W^T) in float64, so that nobody wins by
doing less. An interpreter that is not given, or lacks the library, is a line that says so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

GROUP = 128
DAMPING = 0.01


def draw(k: int, folder: Path) -> None:
    """W and X, inputs of unequal and correlated columns."""
    rng = np.random.default_rng(k)
    X = rng.standard_normal((2 * k, k), np.float32)
    X += 0.5 * np.roll(X, 1, 1)
    X *= np.exp(0.7 * rng.standard_normal(k)).astype(np.float32)
    np.save(folder / "X.npy", X)
    np.save(folder / "W.npy", (0.02 * rng.standard_t(5, (k, k))).astype(np.float32))


def ours(
    W: np.ndarray, X: np.ndarray, threads: int, effort: str, *, errors: bool = False
) -> tuple[float, np.ndarray]:
    from bitwright import ops, schemes
    from bitwright.calib.stats import StatsCollector
    from bitwright.solvers import gptq

    ops.set_threads(threads)
    stats = StatsCollector(W.shape[1]).update(X).finish()
    scheme = schemes.parse(f"int4-g{GROUP}")
    begin = time.perf_counter()
    prepared = gptq.prepare(stats, scheme, damping=DAMPING)
    q, _ = gptq.solve(W, stats, scheme, prepared=prepared, errors=errors, **gptq.EFFORTS[effort])
    return time.perf_counter() - begin, q.dequantize()


def llmcompressor(W: np.ndarray, X: np.ndarray, threads: int) -> tuple[float, np.ndarray]:
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    torch.set_num_threads(threads)
    args = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP
    )
    inputs, weights = torch.from_numpy(X), torch.from_numpy(W)
    H = 2 * (inputs.T @ inputs)[None] / len(X)
    scale = weights.view(len(W), -1, GROUP).abs().amax(-1)[None] / 7.5
    zero = torch.zeros_like(scale)
    with torch.inference_mode():
        begin = time.perf_counter()
        Q, _, fallback = quantize_weight(
            weights.clone()[None], H, scale, zero, None, args, percdamp=DAMPING
        )
        taken = time.perf_counter() - begin
    if bool(fallback.any()):
        raise SystemExit("llm-compressor fell back to plain rounding")
    return taken, Q[0].float().numpy()


def gptqmodel(W: np.ndarray, X: np.ndarray, threads: int) -> tuple[float, np.ndarray]:
    import torch
    from gptqmodel.looper.named_module import NamedModule
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    torch.set_num_threads(threads)
    k = W.shape[1]
    linear = torch.nn.Linear(k, len(W), bias=False)
    linear.weight.data = torch.from_numpy(W.copy())
    linear.target_device = torch.device("cpu")
    named = NamedModule(linear, name="peer", full_name="model.layers.0.peer", layer_index=0)
    config = QuantizeConfig(bits=4, group_size=GROUP, sym=True, desc_act=False)
    config.damp_percent = DAMPING
    solver = GPTQ(named, qcfg=config)
    solver.quantizer.configure(perchannel=True)
    with torch.inference_mode():
        solver.add_batch(torch.from_numpy(X)[None], torch.empty(0))
        begin = time.perf_counter()
        Q = solver.quantize()[0]
        taken = time.perf_counter() - begin
    return taken, Q.float().numpy()


SOLVERS = {
    "bitwright fast": lambda *problem: ours(*problem, "fast"),
    "fast with errors": lambda *problem: ours(*problem, "fast", errors=True),
    "bitwright default": lambda *problem: ours(*problem, "default"),
    "llm-compressor": llmcompressor,
    "GPTQModel": gptqmodel,
}
PEERS = ("llm-compressor", "GPTQModel")


def work(who: str, folder: Path, threads: int) -> None:
    """In the interpreter of `who`: one solve, its seconds to standard output, Q to the folder."""
    W, X = np.load(folder / "W.npy"), np.load(folder / "X.npy")
    SOLVERS[who](W[:256].copy(), X, threads)  # code and libraries are loaded before the clock runs
    seconds, Q = SOLVERS[who](W, X, threads)
    np.save(folder / f"{who}.npy", Q)
    print("\n" + json.dumps(seconds))


def call(who: str, python: str, folder: Path, threads: int) -> tuple[float | None, str]:
    command = [python, __file__, "--work", who, str(folder), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or ["no word"])[-1]
    return float(json.loads(done.stdout.strip().splitlines()[-1])), ""


def compare(k: int, threads: list[int], rounds: int, pythons: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory(prefix="bitwright-peers-") as scratch:
        folder = Path(scratch)
        draw(k, folder)
        W, X = (np.load(folder / f"{name}.npy").astype(np.float64) for name in "WX")
        H = X.T @ X / len(X)
        size = float(np.vdot(W @ H, W))
        for n in threads:
            best: dict[str, float] = {}
            for _ in range(rounds):
                for who, python in pythons.items():
                    seconds, failure = call(who, python, folder, n)
                    if seconds is None:
                        print(f"{who:18} {k} x {k}  {n} threads: {failure}", flush=True)
                    else:
                        best[who] = min(best.get(who, seconds), seconds)
            for who, seconds in best.items():
                E = W - np.load(folder / f"{who}.npy")
                error = float(np.vdot(E @ H, E)) / size
                times = seconds / best["bitwright fast"]
                print(
                    f"{who:18} {k} x {k}  {n} threads  {seconds:7.2f} s  {times:5.1f} x  "
                    f"error {error:.5f}",
                    flush=True,
                )


def main() -> None:
    """Prints one line per solver, size and thread count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--k", type=int, nargs="+", default=[4096, 2048])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--llmcompressor", help="interpreter that has llm-compressor")
    parser.add_argument("--gptqmodel", help="interpreter that has GPTQModel")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.work:
        work(a.work[0], Path(a.work[1]), int(a.work[2]))
        return
    pythons = dict.fromkeys([name for name in SOLVERS if name not in PEERS], sys.executable)
    for who, python in zip(PEERS, (a.llmcompressor, a.gptqmodel), strict=True):
        if python:
            pythons[who] = python
        else:
            print(f"{who}: no interpreter given")
    for k in a.k:
        compare(k, a.threads, a.rounds, pythons)


if __name__ == "__main__":
    main()
