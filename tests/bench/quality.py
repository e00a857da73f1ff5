"""The README's quality table: every method on one checkpoint, in one run.

    python tests/bench/quality.py BASE [--calibration FILE] [--text FILE ...] [--only TEXT,...]

Each row quantizes BASE with 128 x 512 tokens (the shipped calibration text unless told otherwise)
and compares 12 x 512 tokens of the shipped validation text (or each FILE) with BASE. Peak memory is
that of a process of its own, beyond what it held after importing torch and bitwright. --only keeps
the rows that contain one of the texts, such as int4-g64, or "int3-g64-asym gptq fast".
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
from pathlib import Path
from typing import Any

RUNS = (
    ("int4-g64", "rtn", "default"),
    ("int4-g64", "awq", "default"),
    ("int4-g64", "awq+gptq", "fast"),
    ("int4-g64", "gptq", "fast"),
    ("int4-g64", "gptq", "default"),
    ("int4-g64", "gptq", "max"),
    ("int4-g64-asym", "gptq", "default"),
    ("int4-channel", "gptq", "fast"),
    ("int4-channel", "gptq", "default"),
    ("int3-g64-asym", "gptq", "fast"),
    ("int3-g64-asym", "gptq", "default"),
    ("int2-g64-asym", "gptq", "fast"),
    ("int2-g64-asym", "gptq", "default"),
    ("int8-channel", "gptq", "fast"),
)


def one(base: str, row: tuple[str, str, str], calibration: str | None, texts: Any) -> Any:
    """Scores on each text, seconds and bytes of one row."""
    import bitwright  # noqa: PLC0415  in a process of its own
    from bitwright import module, plan  # noqa: PLC0415

    held = plan.resident_bytes()
    scratch = Path(tempfile.mkdtemp())
    try:
        wish = dict(zip(("scheme", "method", "effort"), row, strict=True))
        report = module.quantize(base, out=scratch / "out", calibration=calibration, **wish)
        scores = [bitwright.compare(base, scratch / "out", text=text) for text in texts]
    finally:
        shutil.rmtree(scratch)
    return scores, report.seconds["total"], report.peak_rss - held


def main() -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("--calibration")
    parser.add_argument("--text", nargs="*", default=[None])
    parser.add_argument("--only", default="")
    a = parser.parse_args()
    print("| scheme | method | effort | KL mean | perplexity | top-1 | bits | seconds | MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    context = multiprocessing.get_context("spawn")
    for row in RUNS:
        if not any(part in " ".join(row) for part in a.only.split(",")):
            continue
        with context.Pool(1) as pool:
            scores, seconds, extra = pool.apply(one, (a.base, row, a.calibration, a.text))
        first = scores[0]
        print(
            f"| {' | '.join(row)} | {', '.join(f'{s.kl_mean:.4f}' for s in scores)} "
            f"| {first.perplexity:.2f} | {100 * first.top1:.1f} % | {first.bits_per_weight:.2f} "
            f"| {seconds:.0f} | {extra / 1e6:.0f} |",
            flush=True,
        )
    print(f"\nperplexity of the original: {first.perplexity_base:.2f}")


if __name__ == "__main__":
    main()
