"""The driver: a float checkpoint folder in, a verified quantized folder out.

    open the job -> tokens -> plan -> work folder -> block by block: capture, transform, solve,
    spool
                 -> report -> export, read back, compare -> rename

Everything is resumable: the same call goes on where a killed one stopped, and ends with the same
bytes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bitwright import export, ops, papers, plan
from bitwright.calib import device as devices
from bitwright.calib import precision
from bitwright.calib.capture import Capture, Streams
from bitwright.calib.data import Tokens, are_ids, collect, load_tokenizer, require_text
from bitwright.calib.memory import Heap, resident_bytes, trim
from bitwright.calib.skeleton import ForwardDtype, as_tensor
from bitwright.calib.stats import StatsCollector
from bitwright.clock import Clock
from bitwright.fingerprint import fingerprint
from bitwright.job import Job, open_job
from bitwright.pool import limited
from bitwright.progress import Progress, silent
from bitwright.report import RunReport
from bitwright.solving import BlockSolver
from bitwright.spec import (
    DiskError,
    Group,
    InputError,
    QTensor,
    Recipe,
    RefusedError,
    Stats,
    Target,
)
from bitwright.spool import Finished, Spool, asarrays


class _Run:
    """One run over an opened job."""

    def __init__(self, job: Job, spool: Spool, progress: Progress, planned: plan.Plan) -> None:
        self.job, self.spool, self.progress, self.rerun = job, spool, progress, planned.rerun
        self.heap = Heap(planned.ram_bytes - planned.ram_passing)
        self.clock = Clock(partial(devices.settle, job.device))
        job.checkpoint.reading = partial(self.clock.phase, "read")
        self.notes: list[str] = []
        self.steps = 0  # of the progress, left in this block

    def step(self, count: int = 1) -> None:
        self.steps -= count
        self.progress.advance(count)

    def round_all(self) -> None:
        """Data-free: every linear on its own, no forward."""
        wanted = [target for target in self.job.targets.values() if target.scheme is not None]
        self.progress.start(len(wanted), "round")
        solver = BlockSolver(self.job, self.spool, 0, self._finished, self.clock.phase)
        for target in wanted:
            with self.clock.phase("solve"):
                solver.solve_alone(target)

    def _finished(self, _target: Target) -> None:
        self.progress.advance()

    def sweep(self, ids: npt.NDArray[np.int64]) -> None:
        """Block by block on the calibration tokens (N, length), from where the spool stands."""
        skeleton = self.job.skeleton
        first, hidden = self._inputs(ids)
        capture = Capture(
            skeleton,
            self.job.arch,
            partial(_Collector, self),
            self.job.mix,
            self.job.sums,
            self.heap,
        )
        capture.recall(self.spool.notes())
        stages = capture.stages(first)
        steps = len(hidden) * sum(bool(self.job.mix) or not g.inside_attention for g in stages)
        self.progress.start((skeleton.count - first) * steps, "capture and solve")
        for block in range(first, skeleton.count):
            self.steps = steps
            self._announce(block + 1)
            self.clock.mark()
            hidden = self._block(capture, block, hidden)
            self.step(self.steps)
            if block + 1 < skeleton.count:
                self._save(block + 1, hidden)
            self.clock.keep()
        self.notes += capture.notes

    def _announce(self, block: int) -> None:
        """The block's weights come from the disk while the one before is computed."""
        skeleton = self.job.skeleton
        if block < skeleton.count:
            names = skeleton.under(skeleton.path(block))
            self.job.checkpoint.announce({skeleton.sources[name] for name in names})

    def _save(self, block: int, hidden: list[Streams]) -> None:
        with self.clock.phase("save"):
            self.spool.save_hidden(block, asarrays([h for streams in hidden for h in streams]))

    def _inputs(self, ids: npt.NDArray[np.int64]) -> tuple[int, list[Streams]]:
        """The first block to run and its inputs, of one stream or (quantized, float) per batch."""
        saved, step = self.spool.hidden(), self.job.batch
        starts = range(0, len(ids), step)
        wide = min(self.job.compare, len(starts))
        share = [-(-i * wide // len(starts)) for i in range(len(starts) + 1)]
        widths = [1 + b - a for a, b in pairwise(share)]
        if saved is not None:
            found = iter(saved[1])
            return saved[0], [tuple(as_tensor(next(found)) for _ in range(w)) for w in widths]
        skeleton = self.job.skeleton
        with self.clock.phase("forward"):
            hidden = [
                (skeleton.embed(ids[i : i + step]).cpu(),) * width
                for i, width in zip(starts, widths, strict=True)
            ]
        skeleton.empty()
        self._save(0, hidden)
        return 0, hidden

    def _block(self, capture: Capture, block: int, hidden: list[Streams]) -> list[Streams]:
        phase = self.clock.phase
        solver = BlockSolver(self.job, self.spool, block, lambda _target: None, phase)
        batches = len(hidden)

        def done(group: Group) -> Mapping[str, Any] | None:
            weights = solver.done(group)
            if weights is not None and (self.job.mix or not group.inside_attention):
                self.step(batches)
            return weights

        def solve(group: Group, stats: Stats) -> Mapping[str, Any]:
            self.spool.save_notes(capture.told)
            with phase("solve"):
                return solver.solve(group, stats)

        with phase("forward"):
            outputs = capture.run_block(block, hidden, solve, done, self.rerun)
            _require_finite(outputs, self.job.skeleton.path(block))
        return outputs

    def overrides(self) -> dict[str, npt.NDArray[Any]]:
        """Norms that absorbed column scales, by tensor name."""
        found: dict[str, npt.NDArray[Any]] = {}
        norms = {group.norm for group in self.job.arch.groups if group.norm is not None}
        for block in range(self.job.skeleton.count):
            for norm in sorted(norms):
                name = f"{self.job.skeleton.path(block)}.{norm}"
                known = self.spool.norm(name)
                if known is not None:
                    found[f"{name}.weight"] = known[0]["gain"]
                    if "bias" in known[0]:
                        found[f"{name}.bias"] = known[0]["bias"]
        return found


class _Collector:
    """A StatsCollector whose updates are timed and shown. It holds H of k x k doubles, so nothing
    may refer back to it: a cycle would keep the sums of past groups until the garbage collector
    runs.
    """

    def __init__(self, run: _Run, k: int, heads: int) -> None:
        self.run = run
        self.sums = StatsCollector(k, heads, hold=run.job.hold, sums=run.job.sums_of(k))

    def update(self, x: Any, drift_from: Any = None, stream: Any = None) -> None:
        with self.run.clock.phase("statistics"):
            self.sums.update(x, drift_from, stream)
        self.run.step()

    def finish(self) -> Stats:
        with self.run.clock.phase("statistics"):
            return self.sums.finish()


def _require_finite(batches: list[Streams], where: str) -> None:
    if not all(bool(torch.isfinite(h).all()) for streams in batches for h in streams):
        raise InputError(f"[capture] wanted finite activations, got NaN or infinity behind {where}")


def _report(job: Job, run: _Run, tokens: Tokens | None, begin: float) -> RunReport:
    linears = [run.spool.report(t.name) for t in job.targets.values() if t.scheme is not None]
    return RunReport(
        base=str(job.checkpoint.path),
        recipe=job.recipe,
        calibration="none: data-free" if tokens is None else tokens.description,
        tokens=0 if tokens is None else tokens.total,
        linears=tuple(linears),
        skipped=tuple(t.name for t in job.targets.values() if t.scheme is None),
        notes=(*run.notes, *job.notes()),
        unused_overrides=job.unused,
        versions={name: version(name) for name in ("bitwright", "torch", "transformers", "numpy")},
        isa=ops.isa(),
        threads=job.threads,
        device=devices.label(job.device),
        dtype=job.dtype,
        gram_dtype="" if tokens is None else job.gram_dtype,
        seconds={**run.clock.seconds, "total": time.perf_counter() - begin},
        blocks=tuple(run.clock.blocks),
        peak_rss=resident_bytes(peak=True),
        peak_device=devices.peak_bytes(job.device),
    )


def _sized(recipe: Recipe, calibration: Any) -> Recipe:
    """Given token ids (N, length) are used as they are: they say how many there are."""
    if calibration is None or not are_ids(calibration):
        return recipe
    try:
        shape = np.shape(calibration)
    except ValueError as error:
        raise InputError(
            "[calibration] wanted token ids in rows of one length, got ragged rows"
        ) from error
    return replace(recipe, samples=shape[0], length=shape[1]) if len(shape) == 2 else recipe


def _tokens(job: Job, calibration: Any) -> Tokens | None:
    if isinstance(calibration, str | Path):
        require_text(calibration)
    if job.recipe.method == "rtn":
        return None
    known = are_ids(calibration) and not any(job.checkpoint.path.glob("tokenizer*"))
    tokenizer = None if known else load_tokenizer(job.checkpoint.path)
    vocabulary = job.skeleton.slots[f"{job.skeleton.embeddings}.weight"].meta.shape[0]
    return collect(calibration, tokenizer, job.recipe, vocabulary)


@devices.guarded()
def quantize(
    source: Path,
    out: Path,
    recipe: Recipe,
    *,
    calibration: Any = None,
    work: Path | None = None,
    threads: int | None = None,
    dtype: ForwardDtype | None = None,
    device: str | None = None,
    max_shard_size: int = export.MAX_SHARD_SIZE,
    memory: int | None = None,
    strict: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
    base: str = "",
) -> RunReport:
    """One checkpoint folder into another; the arguments are those of `module.quantize`.

    base: what the result is said to be made from, where it is not `source`."""
    begin = time.perf_counter()
    export.check_destination(out, overwrite)
    recipe = _sized(recipe, calibration)
    job = open_job(source, recipe, dtype=dtype, threads=threads, device=device)
    folder = out.with_name(f"{out.name}.work") if work is None else work
    fresh = work is None and not folder.exists()
    with (
        limited(job.threads),
        precision.products(job.dtype, job.device.type),
        _leaving_nothing(folder if fresh else None),
        Spool(folder) as spool,
    ):
        tokens = _tokens(job, calibration)
        devices.peak_bytes(job.device, forget=True)
        run = _Run(job, spool, progress, plan.make_for(job, memory, timed=False))
        with run.clock.phase("read"):
            spool.start(fingerprint(job, None if tokens is None else tokens.ids))
        if tokens is None:
            run.round_all()
        else:
            run.sweep(tokens.ids)
            trim()
        report = replace(_report(job, run, tokens, begin), base=base or str(source))
        if strict:
            report.raise_if_strict()
        report = _write(job, run, report, out, max_shard_size, progress, begin)
    if work is None:
        shutil.rmtree(folder)
    return report


@contextmanager
def _leaving_nothing(folder: Path | None) -> Iterator[None]:
    """Input that cannot be used takes the work folder that it made along: nothing could go on
    there. A full disk, a full GPU or an interruption leaves it."""
    try:
        yield
    except (InputError, RefusedError) as error:
        if folder is not None and not isinstance(error, DiskError):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _write(
    job: Job, run: _Run, report: RunReport, out: Path, shard: int, progress: Progress, begin: float
) -> RunReport:
    result = export.Result(
        job.checkpoint,
        export.names_to_write(job.checkpoint.entries, job.skeleton.sources),
        job.targets,
        _quantized(run.spool),
        run.overrides(),
    )
    finished: list[RunReport] = []
    job.checkpoint.reading = nullcontext
    since = time.perf_counter()

    def finish(folder: Path) -> None:
        now = time.perf_counter()
        seconds = dict(report.seconds) | {"write": now - since, "total": now - begin}
        done = replace(report, seconds=seconds, peak_rss=resident_bytes(peak=True))
        finished.append(done)
        papers.write(folder, done, out)

    export.export(
        result, job.format, out,
        version=version("bitwright"), max_shard_size=shard, progress=progress, finish=finish,
    )  # fmt: skip
    return finished[0]


def _quantized(spool: Spool) -> Callable[[str], QTensor]:
    def read(name: str) -> QTensor:
        done: Finished | None = spool.load(name)
        if done is None:
            raise InputError(f"[work] wanted {name} in {spool.folder}, found none")
        return done.q

    return read
