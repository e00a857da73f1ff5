"""The README's quality table: every method on one checkpoint, in one run.

    python tests/bench/quality.py BASE [--calibration FILE] [--text FILE] [--only int4-g64/gptq,...]

Each row quantizes BASE with 128 x 512 tokens (the shipped calibration text unless told otherwise)
and compares 12 x 512 tokens of the shipped validation text (or FILE) with BASE. Peak memory is that
of a process of its own, beyond what it held after importing torch and bitwright.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
from pathlib import Path
from typing import Any

RUNS = (
    ("int4-g64", "rtn"),
    ("int4-g64", "awq"),
    ("int4-g64", "gptq"),
    ("int4-g64", "awq+gptq"),
    ("int4-g64-asym", "gptq"),
    ("int3-g64-asym", "rtn"),
    ("int3-g64-asym", "gptq"),
    ("int2-g64-asym", "gptq"),
    ("int4-channel", "gptq"),
    ("int8-channel", "gptq"),
)


def one(base: str, scheme: str, method: str, calibration: str | None, text: str | None) -> Any:
    """Scores, seconds and bytes of one row."""
    import bitwright  # noqa: PLC0415  in a process of its own
    from bitwright import module, plan  # noqa: PLC0415

    held = plan.resident_bytes()
    scratch = Path(tempfile.mkdtemp())
    try:
        report = module.quantize(
            base, out=scratch / "out", scheme=scheme, method=method, calibration=calibration
        )
        scores = bitwright.compare(base, scratch / "out", text=text)
    finally:
        shutil.rmtree(scratch)
    return scores, report.seconds["total"], report.peak_rss - held


def main() -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("--calibration")
    parser.add_argument("--text")
    parser.add_argument("--only", default="")
    a = parser.parse_args()
    print("| scheme | method | KL mean | perplexity | top-1 | bits | seconds | MB above torch |")
    print("|---|---|---|---|---|---|---|---|")
    context = multiprocessing.get_context("spawn")
    for scheme, method in RUNS:
        if a.only and f"{scheme}/{method}" not in a.only.split(","):
            continue
        with context.Pool(1) as pool:
            scores, seconds, extra = pool.apply(
                one, (a.base, scheme, method, a.calibration, a.text)
            )
        print(
            f"| {scheme} | {method} | {scores.kl_mean:.4f} | {scores.perplexity:.2f} "
            f"| {100 * scores.top1:.1f} % | {scores.bits_per_weight:.2f} | {seconds:.0f} "
            f"| {extra / 1e6:.0f} |",
            flush=True,
        )
    print(f"\nperplexity of the original: {scores.perplexity_base:.2f}")


if __name__ == "__main__":
    main()
