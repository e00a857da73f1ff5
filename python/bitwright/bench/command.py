"""`bitwright bench`, as the command line has it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from bitwright.deferred import Deferred

if TYPE_CHECKING:
    from bitwright import show
    from bitwright.bench import measure
else:
    show, measure = Deferred("bitwright.show"), Deferred("bitwright.bench.measure")


def run(
    k: Annotated[int, typer.Option("--k", help="Columns of the matrices.", min=1)] = 4096,
    threads: Annotated[
        int | None, typer.Option("--threads", help="Beside 1. [all CPUs]", min=1)
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One repeat: does everything run? No figures.")
    ] = False,
    json: Annotated[
        str | None, typer.Option("--json", help="Also as JSON to this file; -: stdout.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars, no tables.")] = False,
) -> None:
    """What this machine can do, our hot operations, and the same by torch, OpenBLAS and Eigen."""
    printer = show.Printer(json, quiet)
    with show.Bars(quiet) as bars:
        found = measure.run(k, threads, quick, bars)
    show.bench(printer, found)
    printer.json(found.to_dict())
