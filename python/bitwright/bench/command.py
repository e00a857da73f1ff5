"""`bitwright bench [DIR]`, as the command line has it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from bitwright.deferred import Deferred

if TYPE_CHECKING:
    from bitwright import show
    from bitwright.bench import measure, models
else:
    show, measure = Deferred("bitwright.show"), Deferred("bitwright.bench.measure")
    models = Deferred("bitwright.bench.models")


def run(
    folder: Annotated[
        str | None,
        typer.Argument(help="A quantized checkpoint, or a hub id: its speed. [none: of our ops]"),
    ] = None,
    original: Annotated[
        str | None, typer.Option("--original", help="The float model. [what the folder names]")
    ] = None,
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
    """What this machine can do, our hot operations, and the same by torch, OpenBLAS and Eigen; or a
    quantized model's tokens a second, beside its original in torch."""
    printer = show.Printer(json, quiet)
    with show.Bars(quiet) as bars:
        if folder is not None:
            compared = models.run(folder, original, threads, quick, bars)
            models.tell(printer, compared)
            printer.json(compared.to_dict())
            return
        found = measure.run(k, threads, quick, bars)
    show.bench(printer, found)
    printer.json(found.to_dict())
