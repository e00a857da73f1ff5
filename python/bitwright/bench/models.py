"""`bitwright bench DIR`: a quantized folder on our kernels beside its original in torch.

Each contender runs in a process of its own (hf.speed), one after the other, so that its memory is
its own; all get the same tokens. The original is what the caller names, else what the folder's
report names, where that is a folder here; else the folder's own weights as floats, which take torch
as long.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitwright import ops, papers, show
from bitwright.bench.measure import machine
from bitwright.files.hub import resolve
from bitwright.progress import Progress, silent
from bitwright.spec import BitwrightError, InputError

MODULE = "bitwright.hf.speed"
OURS: dict[str, dict[str, Any]] = {
    "bitwright fast": {},
    "bitwright exact": {"mode": "exact"},
    "bitwright fast, not fused": {"fused": False},
}
DTYPES = ("bfloat16", "float32")
QUICK = {"prompt": 8, "context": 4, "tokens": 3, "repeats": 1}


@dataclass(frozen=True)
class Row:
    """prefill, decode: tokens a second; load_per_gb: seconds for each GB of the files, beyond what
    reading their bytes took."""

    who: str
    dtype: str
    threads: int
    prefill: float
    decode: float
    peak_rss: int
    load_seconds: float
    load_per_gb: float


@dataclass(frozen=True)
class Compared:
    """original: its folder; "" where the folder's own weights stand for it."""

    machine: dict[str, str]
    load: float
    folder: str
    original: str
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def original_of(folder: Path, named: str | None) -> str:
    """Where the float original is; "": not here. InputError for a named one that is not."""
    if named is not None:
        return str(resolve(named))
    report = papers.read(folder)
    here = report is not None and (Path(report.base) / "config.json").is_file()
    return report.base if report is not None and here else ""


def _contenders(folder: Path, original: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for dtype in DTYPES:
        for who, wish in OURS.items():
            yield who, dtype, {"folder": str(folder), "engine": "bitwright", **wish}
        engine = "torch" if original else "dequantized"
        yield "torch", dtype, {"folder": original or str(folder), "engine": engine, "fused": False}


def _run(wish: dict[str, Any]) -> dict[str, Any]:
    """One contender; BitwrightError with its last words where it breaks down."""
    done = subprocess.run(
        [sys.executable, "-m", MODULE, json.dumps(wish)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        words = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        name, _, told = words.partition("Error: ")
        kind = InputError if name.endswith("Input") else BitwrightError
        raise kind(f"[bench] wanted {wish['folder']} to run, got: {told or words}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(
    folder: str,
    original: str | None = None,
    threads: int | None = None,
    quick: bool = False,
    progress: Progress = silent,
    cpu: bool = False,
) -> Compared:
    """All contenders, on one thread and on `threads` (None: all). cpu: by the time that processes
    take, not the clock's; for one thread."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    path = resolve(folder)
    base = original_of(path, original)
    counts = sorted({1, ops.resolve_threads(threads)})
    contenders, rows = list(_contenders(path, base)), []
    progress.start(len(contenders), "models")
    for who, dtype, wish in contenders:
        found = _run(
            {**wish, "dtype": dtype, "threads": counts, "cpu": cpu, **(QUICK if quick else {})}
        )
        beyond = max(found["load_seconds"] - found["read_seconds"], 0.0) / found["bytes"] * 1e9
        rows += [
            Row(
                who, dtype, one["threads"], one["prefill"], one["decode"], found["peak_rss"],
                found["load_seconds"], beyond,
            )
            for one in found["speeds"]
        ]  # fmt: skip
        progress.advance()
    return Compared(machine(), load, str(path), base, tuple(rows))


def tell(to: show.Printer, found: Compared) -> None:
    """What `bitwright bench DIR` prints."""
    about = found.machine
    to.line(f"{about['processor']}, {about['cpus']} CPUs, {about['isa']}; load {found.load:.1f}")
    if not found.original:
        to.line("the original is not here (--original names it): its place has these weights as "
                "floats, which take torch as long")  # fmt: skip
    for threads in sorted({row.threads for row in found.rows}):
        rows = [row for row in found.rows if row.threads == threads]
        best = [max(getattr(r, w) for r in rows if r.who == "torch") for w in ("prefill", "decode")]
        to.line()
        to.table(
            (f"{threads} thread{'s' * (threads > 1)}", "dtype", "prefill", "decode",
             "prefill, decode / best of torch", "peak memory", "loaded in", "a GB"),
            [
                (
                    row.who, row.dtype, f"{row.prefill:.0f}", f"{row.decode:.1f}",
                    f"{row.prefill / best[0]:.2f} x, {row.decode / best[1]:.2f} x",
                    show.size(row.peak_rss), f"{row.load_seconds:.1f} s",
                    f"{row.load_per_gb:.1f} s",
                )
                for row in rows
            ],
        )  # fmt: skip
    to.line()
    to.line("prefill, decode: tokens a second; a GB: of loading, beyond reading the bytes")
