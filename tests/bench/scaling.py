"""How the solve of a wide matrix grows with its columns k: seconds and peak memory beside the plan.

    python tests/bench/scaling.py [--columns 3584 7168 14336] [--rows 512] [--repeats 3]
                                  [--threads N]

Each k has a process of its own, so that VmHWM is its peak. H is a diagonal and a matrix of rank 16:
k^2 doubles, once. For W of m rows at `--effort fast`, in operations (two for each multiply-add):

    factor    H + damping = R R^T: k^3 / 3
    sweep     rounding with feedback: m k^2
    solve     scale search, sweep, and the two quadratic forms of the report: 3 m k^2

`growth` is the time over that of the line above, divided by how much the operations grew; bytes are
VmHWM beyond what the process held before H, and what sizes.py plans for solving `down`. From `ONCE`
columns on there are no repeats. k = 28672 takes 14 GB and some minutes.
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

from bitwright import ops, recipe, schemes
from bitwright.calib.memory import resident_bytes
from bitwright.job import outline_job
from bitwright.sizes import Sizes
from bitwright.solvers import gptq
from bitwright.spec import F32, F64, Stats

SCHEME, ONCE, RANK = "int4-g128", 10000, 16
PARTS = ("factor", "sweep", "solve")


def hessian(k: int) -> F64:
    """Positive definite, with correlated columns of unequal size."""
    rng = np.random.default_rng(0)
    size = np.exp(rng.standard_normal((k, 1)))
    U, H = size * rng.standard_normal((k, RANK)), np.empty((k, k))
    np.matmul(U, U.T, out=H)
    H.reshape(-1)[:: k + 1] += RANK * size[:, 0] ** 2
    return H


def stats_of(H: F64) -> Stats:
    size = np.sqrt(np.diagonal(H)).astype(np.float32)
    return Stats(len(H), H, size, size, -size, size)


def measured(k: int, rows: int, repeats: int) -> dict[str, float]:
    """Least seconds of each part, and the peak."""
    scheme, options = schemes.parse(SCHEME), gptq.EFFORTS["fast"]
    W: F32 = 0.02 * np.random.default_rng(1).standard_normal((rows, k), np.float32)
    ops.factor(np.eye(256))  # threads and libraries are there
    before, stats = resident_bytes() - W.nbytes, stats_of(hessian(k))
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}
    repeats = repeats if k < ONCE else 1
    for _ in range(repeats):
        prepared = None
        begin = time.perf_counter()
        prepared = gptq.prepare(stats, scheme)
        seconds["factor"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        gptq.solve(W, stats, scheme, prepared=prepared, **options)
        seconds["solve"].append(time.perf_counter() - begin)
    peak = resident_bytes(peak=True) - before
    scales, zeros = ops.fit(W, scheme)
    for _ in range(repeats):
        begin = time.perf_counter()
        ops.gptq(W, prepared[0].factor, prepared[0].order, scales, zeros, scheme)
        seconds["sweep"].append(time.perf_counter() - begin)
    return {"peak": float(peak), **{part: min(found) for part, found in seconds.items()}}


def planned(k: int, rows: int) -> int:
    """Bytes of solving `down` in a block with k columns there and `rows` hidden ones."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": rows,
        "intermediate_size": k,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 256,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config))
        job = outline_job(path, recipe.from_dict({"scheme": SCHEME, "effort": "fast"}))
    group = next(g for g in job.arch.groups if any("mlp.down" in x.roles for x in g.linears))
    return Sizes(job).solving(group)


def line(k: int, m: int, new: dict[str, float], old: tuple[int, dict[str, float]] | None) -> str:
    work = {"factor": k**3 / 3, "sweep": m * k**2, "solve": 3 * m * k**2}
    told = f"{k:6}"
    for part in PARTS:
        told += f"  {new[part]:7.2f} s {work[part] / new[part] / 1e9:5.1f} GFLOP/s"
        if old is None:
            told += "      "
        else:
            power = 3 if part == "factor" else 2
            told += f" {new[part] / old[1][part] / (k / old[0]) ** power:5.2f}"
    plan = planned(k, m)
    per = (new["peak"] / k**2, plan / k**2, new["peak"] / plan)
    return told + "  {:6.2f} GB {:5.2f} k^2 {:5.2f} {:5.2f}".format(new["peak"] / 1e9, *per)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--columns", type=int, nargs="+", default=[3584, 7168, 14336])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--one", action="store_true", help="the first k alone, as JSON")
    a = parser.parse_args()
    threads = ops.set_threads(a.threads)
    if a.one:
        return print(json.dumps(measured(a.columns[0], a.rows, a.repeats)))
    print(f"{a.rows} rows, {SCHEME}, fast, {threads} threads, {ops.isa()}")
    titles = "".join(f"  {part:24} growth" for part in PARTS)
    print(f"     k{titles}        peak     per plan   peak / plan")
    old = None
    for k in a.columns:
        own = [sys.executable, __file__, "--one", "--columns", str(k), "--threads", str(threads)]
        own += ["--rows", str(a.rows), "--repeats", str(a.repeats)]
        done = subprocess.run(own, check=True, stdout=subprocess.PIPE, text=True)
        new = json.loads(done.stdout)
        print(line(k, a.rows, new, old), flush=True)
        old = (k, new)
    return None


if __name__ == "__main__":
    main()
