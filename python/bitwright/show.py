"""What people see in a terminal: progress bars, tables, sentences."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from bitwright import clock
from bitwright.spec import InputError

if TYPE_CHECKING:
    from bitwright.bench.measure import Measured
    from bitwright.demo import Shown
    from bitwright.evaluate import Evaluation
    from bitwright.inspection import Inspection
    from bitwright.plan import Plan, Row
    from bitwright.report import RunReport

WORST = 3  # linears named in a summary
PIPED = 160  # columns where there is no terminal
_BLOCK = re.compile(r"\.(\d+)(?=\.)")


def size(count: int) -> str:
    """Bytes for people, decimal."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class Bars:
    """progress.Progress with bars and the time left, on standard error; nothing when quiet."""

    def __init__(self, quiet: bool) -> None:
        console = Console(stderr=True)
        self._bars = RichProgress(
            TextColumn("{task.description:>18}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def start(self, total: int, what: str) -> None:
        """Begins a phase; the one before is full."""
        if self._task is not None:
            self._bars.stop_task(self._task)
        self._task = self._bars.add_task(what, total=total)

    def advance(self, n: int = 1) -> None:
        """n steps further."""
        if self._task is not None:
            self._bars.advance(self._task, n)


class Printer:
    """Tables to standard output; to standard error while JSON has it (`--json -`)."""

    def __init__(self, json_to: str | None = None, quiet: bool = False) -> None:
        self.json_to, self.quiet = json_to, quiet
        target = Path(json_to or "-")
        if json_to not in (None, "-") and (target.is_dir() or not target.parent.is_dir()):
            raise InputError(f"[json] wanted a file in a folder that is there, got {json_to}")
        console = Console(stderr=json_to == "-")
        self.console = console if console.is_terminal else Console(file=console.file, width=PIPED)

    def line(self, text: str = "") -> None:
        """One line as it is, unless quiet."""
        if not self.quiet:
            self.plain(text)

    def plain(self, text: str) -> None:
        """One line as it is, also when quiet."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def table(self, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table whose first column is text and whose others are figures, unless quiet."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for i, head in enumerate(heads):
            table.add_column(head, justify="right" if i else "left", overflow="fold")
        self._print(table, rows)

    def facts(self, rows: Iterable[tuple[str, str]]) -> None:
        """Names and what is to be said of each, unless quiet."""
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        self._print(table, rows)

    def _print(self, table: Table, rows: Iterable[Sequence[str]]) -> None:
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        if not self.quiet:
            self.console.print(table)

    def json(self, content: Any) -> None:
        """The same as data, where --json asked for it."""
        if self.json_to is None:
            return
        text = json.dumps(content, indent=1, ensure_ascii=False, default=str)
        if self.json_to == "-":
            sys.stdout.write(text + "\n")
        else:
            Path(self.json_to).write_text(text + "\n", encoding="utf-8")


def _condensed(rows: Iterable[Row]) -> list[tuple[str, Row, int, int]]:
    """Rows that differ only in the block number as one: name, row, how many, bytes."""
    groups: dict[tuple[str, Any, str], list[Row]] = {}
    for row in rows:
        key = (_BLOCK.sub(".{}", row.name, count=1), row.shape, row.scheme)
        groups.setdefault(key, []).append(row)
    found = []
    for (name, _, _), same in groups.items():
        numbers = [int(m[1]) for row in same if (m := _BLOCK.search(row.name))]
        spelled = name.format(_ranges(numbers)) if numbers else name
        found.append((spelled, same[0], len(same), sum(row.bytes for row in same)))
    return found


def _ranges(numbers: Sequence[int]) -> str:
    """0,1,2,5 as "{0-2,5}"; one number as itself."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "1"


def plan(to: Printer, p: Plan) -> None:
    """What `bitwright plan` prints."""
    to.table(
        ("linear", "shape", "scheme", "count", "size"),
        [
            (name, _shape(row.shape), row.scheme, str(count), size(total))
            for name, row, count, total in _condensed(p.rows)
        ],
    )
    to.line()
    stages = ", ".join(f"{name} {size(count)}" for name, count in p.ram.items())
    block = ", ".join(f"at {label} {size(count)}" for label, count in p.block.items())
    spent = _shares(clock.shares(p.parts))
    rows = [
        ("peak memory", f"{size(p.ram_bytes)} ({size(p.ram_base)} held already; {stages})"),
        *([("memory of a block", block)] if block else []),
        *([(f"memory of {p.device}", size(p.device_bytes))] if p.device_bytes else []),
        ("disk", f"{size(p.disk_bytes)} while it runs, {size(p.output_bytes)} in the end"),
        ("time", f"about {duration(p.seconds)} on this machine: {spent}"),
        ("calibration", f"{p.tokens} tokens" if p.tokens else "none: data-free"),
    ]
    to.facts(rows)
    for note in p.notes:
        to.line(f"note: {note}")


def _shares(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())


def profile(to: Printer, done: RunReport) -> None:
    """What `bitwright quantize --profile` adds: where each block's time went."""
    totals = [sum(seconds.values()) for seconds in done.blocks]
    rows = [
        (
            str(i),
            f"{total:.2f}",
            *(f"{s * total:.2f} ({100 * s:.0f} %)" for s in clock.shares(seconds).values()),
        )
        for i, (seconds, total) in enumerate(zip(done.blocks, totals, strict=True))
    ]
    to.table(("block", "seconds", *clock.shares({})), rows)
    to.line()


def _device(done: RunReport) -> str:
    return f"{done.device} ({size(done.peak_device)} at most)"


def report(to: Printer, done: RunReport, folder: Path, total: int) -> None:
    """What `bitwright quantize` says in the end, but for the load line."""
    methods = ", ".join(f"{count} x {method}" for method, count in done.methods().items())
    seconds = ", ".join(f"{k} {v:.1f}" for k, v in done.seconds.items())
    to.facts(
        [
            ("folder", f"{folder} ({size(total)} of weights)"),
            ("linears", methods + (f", {len(done.skipped)} in float" if done.skipped else "")),
            *([("effort", done.solver())] if done.solver() else []),
            ("bits per weight", f"{done.bits_per_weight:.3f}"),
            *([("device", _device(done))] if done.device not in ("", "cpu") else []),
            ("calibration", done.calibration),
            ("seconds", seconds),
            ("shares", _shares(done.shares())),
            ("peak memory", size(done.peak_rss)),
        ],
    )
    to.line()
    to.table(
        ("largest errors", "scheme", "rounding", "error"),
        [
            (one.name, one.scheme, f"{one.error_rtn:.5f}", f"{one.error:.5f}")
            for one in done.worst(WORST)
        ],
    )
    for pattern in done.unused_overrides:
        to.plain(f"note: the override {pattern!r} matched no linear")
    for note in done.notes:
        to.plain(f"note: {note}")
    if done.fallbacks:
        to.plain(f"{len(done.fallbacks)} fallbacks:")
        for one in done.fallbacks:
            to.plain(f"  {one.name}: {one.fallback}")


def evaluation(to: Printer, e: Evaluation) -> None:
    """What `bitwright eval` prints."""
    to.table(
        ("", "original", "quantized"),
        [
            ("perplexity", f"{e.perplexity_base:.3f}", f"{e.perplexity:.3f}"),
            ("KL mean", "", f"{e.kl_mean:.5f}"),
            ("KL median", "", f"{e.kl_median:.5f}"),
            ("KL 99 %", "", f"{e.kl_p99:.5f}"),
            ("top-1 agreement", "", f"{100 * e.top1:.2f} %"),
            ("weights", size(e.bytes_base), size(e.bytes)),
            ("bits per weight", "", f"{e.bits_per_weight:.3f}" if e.bits_per_weight else "float"),
            ("seconds", f"{e.seconds_base:.1f}", f"{e.seconds:.1f}"),
        ],
    )
    to.line(f"{e.tokens} tokens of {e.text}; KL in nats, float32 forward of both")


def inspection(to: Printer, found: Inspection) -> None:
    """What `bitwright inspect` prints."""
    kind = found.quant_method or "float"
    to.line(f"{found.path}: {found.model}, {kind}, {size(found.bytes)} of weights")
    if found.bits_per_weight:
        to.line(f"{found.bits_per_weight:.3f} bits per weight in the quantized linears")
    if found.fused:
        to.line(found.fused)
    to.table(
        ("tensor", "shape", "stored as", "count", "size", "largest error"),
        [
            (
                one.name,
                _shape(one.shape),
                one.scheme,
                str(one.count),
                size(one.bytes),
                "" if one.error is None else f"{one.error:.5f}",
            )
            for one in found.entries
        ],
    )
    if found.damage:
        to.line(f"note: {found.damage}")
    if found.report is not None:
        done = found.report
        to.line(f"made by bitwright from {done.base}, {done.recipe.method}, {done.calibration}")
        for one in done.fallbacks:
            to.line(f"fallback: {one.name}: {one.fallback}")


def demo(to: Printer, rows: Sequence[Shown]) -> None:
    """What `bitwright demo` prints."""
    to.table(
        ("scheme and method", "KL mean", "top-1", "perplexity", "original", "weights", "seconds"),
        [
            (
                f"{row.scheme} {row.method}",
                f"{row.evaluation.kl_mean:.4f}",
                f"{100 * row.evaluation.top1:.1f} %",
                f"{row.evaluation.perplexity:.2f}",
                f"{row.evaluation.perplexity_base:.2f}",
                size(row.evaluation.bytes),
                f"{row.seconds:.1f}",
            )
            for row in rows
        ],
    )


def _rate(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def bench(to: Printer, found: Measured) -> None:
    """What `bitwright bench` prints."""
    about = found.machine
    to.line(f"{about['processor']}, {about['cpus']} CPUs, {about['isa']}; load {found.load:.1f}")
    to.table(
        ("peak", "float32", "float64", "bf16 pairs", "read"),
        [
            (
                f"{p.threads} thread{'s' * (p.threads > 1)}",
                *(f"{_rate(x)} GFLOP/s" for x in (p.float32, p.float64, p.bfloat16)),
                f"{p.read:.1f} GB/s",
            )
            for p in found.peaks
        ],
    )
    for peak in found.peaks:
        to.line()
        _bench_table(to, found, peak.threads)
    to.line()
    for note in found.notes:
        to.line(note)


def _bench_table(to: Printer, found: Measured, threads: int) -> None:
    rows: dict[str, dict[str, Any]] = {}
    for one in found.times:
        if one.threads == threads:
            rows.setdefault(one.op, {})[one.who] = one
    rivals = ("torch highest", "torch medium", "torch bfloat16", "OpenBLAS", "Eigen")
    lines = []
    for op, who in rows.items():
        ours = who["bitwright"]
        others = [who[name].rate if name in who else None for name in rivals]
        best = max((rate for rate in others if rate is not None), default=None)
        lines.append(
            (
                f"{op}, {ours.shape}",
                f"{ours.seconds:.3f}" if ours.seconds < 10 else f"{ours.seconds:.1f}",
                _rate(ours.rate),
                f"{100 * ours.share:.0f} %",
                *map(_rate, others),
                "-" if best is None else f"{ours.rate / best:.2f} x",
            )
        )
    heads = [f"{threads} thread{'s' * (threads > 1)}", "seconds", "rate", "of peak"]
    to.table((*heads, *(name.replace("bfloat16", "bf16") for name in rivals), "ours / best"), lines)
