"""The README's quality table: every method on one checkpoint, in one run.

    python tests/bench/quality.py BASE [--calibration FILE|mixed] [--text FILE ...]
                                  [--only TEXT,...] [--samples 128]

Each row quantizes BASE with 128 x 512 tokens (the shipped books unless told otherwise)
and compares 12 x 512 tokens of three texts (texts.py, or each FILE) with BASE. Peak memory is
that of a process of its own, beyond what it held after importing torch and bitwright. --only keeps
the rows that contain one of the texts, such as int4-g64, or "int3-g64-asym gptq fast"; without it
rows of number formats other than integers, and of fixed scales, are there as well.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
from pathlib import Path
from typing import Any

from texts import scored

RUNS = (  # scheme, method, effort, scales where they are not the effort's
    "int4-g64 rtn default",
    "int4-g64 awq default",
    "int4-g64 awq+gptq fast",
    "int4-g64 gptq fast",
    "int4-g64 gptq fast mse",
    "int4-g64 gptq default",
    "int4-g64 gptq max",
    "int4-g64-asym gptq default",
    "int4-channel gptq fast",
    "int4-channel gptq fast mse",
    "int4-channel gptq default",
    "int3-g64-asym gptq fast",
    "int3-g64-asym gptq default",
    "int2-g64-asym gptq fast",
    "int2-g64-asym gptq default",
    "int8-channel gptq fast",
    *(
        f"{table} {how}"
        for table in ("nvfp4", "mxfp4", "nf4-g64")
        for how in ("rtn default", "gptq fast minmax", "gptq fast mse", "gptq default")
    ),
)


def one(base: str, row: str, samples: int, calibration: str, texts: Any) -> Any:
    """Scores on each text, seconds and bytes of one row."""
    import bitwright  # noqa: PLC0415  in a process of its own
    from bitwright import module  # noqa: PLC0415
    from bitwright.calib.memory import resident_bytes  # noqa: PLC0415

    held = resident_bytes()
    scratch = Path(tempfile.mkdtemp())
    try:
        scheme, method, effort, *scales = row.split()
        report = module.quantize(
            base, out=scratch / "out", calibration=calibration, scheme=scheme, method=method,
            effort=effort, samples=samples, options={"scales": scales[0]} if scales else {},
            format="bitwright",
        )  # fmt: skip
        scores = [bitwright.compare(base, scratch / "out", text=text) for text in texts]
    finally:
        shutil.rmtree(scratch)
    return scores, report.seconds["total"], report.peak_rss - held


def main() -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("--calibration", default="books")
    parser.add_argument("--text", nargs="*")
    parser.add_argument("--only", default="")
    parser.add_argument("--samples", type=int, default=128)
    a = parser.parse_args()
    print("| scheme, method, effort | KL: book, topics, code | ppl | top-1 | bits | seconds | MB |")
    print("|---|---|---|---|---|---|---|")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        texts = a.text or scored(Path(folder))
        for row in RUNS:
            if not any(part in row for part in a.only.split(",")):
                continue
            with context.Pool(1) as pool:
                wish = (a.base, row, a.samples, a.calibration, texts)
                scores, seconds, extra = pool.apply(one, wish)
            first = scores[0]
            print(
                f"| {row} | {', '.join(f'{s.kl_mean:.4f}' for s in scores)} "
                f"| {first.perplexity:.2f} | {100 * first.top1:.1f} % "
                f"| {first.bits_per_weight:.2f} | {seconds:.0f} | {extra / 1e6:.0f} |",
                flush=True,
            )
    print(f"\nperplexity of the original: {first.perplexity_base:.2f}")


if __name__ == "__main__":
    main()
