"""Seconds of one GPTQ solve, factorisation and scale search included: minima over repeats.

python tests/bench/solve.py [--effort fast] [--k 4096] [--n 4096] [--group 128] [--repeats 5]
                            [--threads N]
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from bitwright import ops, schemes
from bitwright.calib.stats import StatsCollector
from bitwright.solvers import gptq


def main() -> None:
    """Prints one line per phase."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("k", 4096), ("n", 4096), ("group", 128), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--effort", choices=gptq.EFFORTS, default="fast")
    a = parser.parse_args()
    threads = ops.set_threads(a.threads)
    rng = np.random.default_rng(0)
    X = rng.standard_normal((2 * a.k, a.k)).astype(np.float32)
    X *= np.exp(rng.standard_normal(a.k)).astype(np.float32)
    begin = time.perf_counter()
    stats = StatsCollector(a.k).update(X).finish()
    gram = time.perf_counter() - begin
    W = rng.standard_normal((a.n, a.k)).astype(np.float32)
    scheme = schemes.parse(f"int4-g{a.group}")
    factor, solve, told = [], [], []
    for _ in range(a.repeats):
        begin = time.perf_counter()
        prepared = gptq.prepare(stats, scheme)
        middle = time.perf_counter()
        gptq.solve(W, stats, scheme, prepared=prepared, errors=False, **gptq.EFFORTS[a.effort])
        end = time.perf_counter()
        gptq.solve(W, stats, scheme, prepared=prepared, **gptq.EFFORTS[a.effort])
        factor.append(middle - begin)
        solve.append(end - middle)
        told.append(time.perf_counter() - end)
    print(f"W {a.n} x {a.k}, {scheme.name}, {a.effort}, {threads} threads, {ops.isa()}")
    print(f"Gram of {len(X)} tokens {gram:.2f} s, {len(X) * a.k**2 / gram / 1e9:.0f} GFLOP/s")
    print(f"factor {min(factor):.2f} s, search + sweep {min(solve):.2f} s", end=", ")
    print(f"with the report's errors {min(told):.2f} s")
    print(f"together {min(f + s for f, s in zip(factor, solve, strict=True)):.2f} s")


if __name__ == "__main__":
    main()
