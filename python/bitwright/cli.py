"""The command line.

    bitwright quantize SRC OUT      bitwright plan SRC          bitwright eval BASE QUANT
    bitwright inspect PATH          bitwright convert OUT OUT2  bitwright demo [OUT]
    bitwright generate OUT          bitwright chat OUT
    bitwright bench

Exit codes: 0 done; 1 a bug (please report it); 2 wrong usage, unusable input, a full disk or GPU; 3
refused: a format or method cannot do what was asked; 4 a computation broke down, or --strict met a
fallback; 5 what was written does not read back as what was meant; 130 interrupted, the same command
goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitwright import talk
from bitwright.bench import command as bench
from bitwright.deferred import Deferred
from bitwright.errors import (
    BitwrightError,
    InputError,
    NumericalError,
    RefusedError,
    VerificationError,
)
from bitwright.options import (
    Calibration,
    Chat,
    Effort,
    Format,
    ForwardDevice,
    ForwardType,
    Json,
    Length,
    Memory,
    Method,
    Overwrite,
    Profile,
    Quiet,
    RecipeFile,
    Samples,
    SchemeName,
    Seed,
    ShardSize,
    Source,
    Strict,
    Threads,
    Work,
)

if TYPE_CHECKING:
    from transformers.utils import logging as transformers_logging

    from bitwright import conversion, demo, evaluate, inspection, module, papers, plan, show
    from bitwright import recipe as recipes
    from bitwright.calib import data
    from bitwright.files import checkpoint, hub
else:
    conversion, demo, evaluate, inspection, module, papers, plan, show, recipes = (
        Deferred(f"bitwright.{name}")
        for name in (
            "conversion",
            "demo",
            "evaluate",
            "inspection",
            "module",
            "papers",
            "plan",
            "show",
            "recipe",
        )
    )
    data, checkpoint = Deferred("bitwright.calib.data"), Deferred("bitwright.files.checkpoint")
    hub = Deferred("bitwright.files.hub")
    transformers_logging = Deferred("transformers.utils.logging")

EXIT_CODES: tuple[tuple[type[BitwrightError], int], ...] = (
    (InputError, 2),
    (RefusedError, 3),
    (NumericalError, 4),
    (VerificationError, 5),
    (BitwrightError, 1),
)
INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Quantize language models after training, on the computer you have.",
    epilog="Exit codes: 0 done, 1 a bug, 2 wrong usage or unusable input, 3 refused, 4 numerical "
    "failure or --strict, 5 written files do not read back, 130 interrupted (run again to resume).",
)


def guarded(command: Callable[..., None], models: bool = True) -> Callable[..., None]:
    """Errors made on purpose become one line and an exit code; Ctrl-C ends cleanly. models: the
    command needs transformers, which are told to be quiet."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            if models:
                transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
                transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
            command(*args, **kwargs)
        except BitwrightError as error:
            typer.echo(f"bitwright: {error}", err=True)
            code = next(code for kind, code in EXIT_CODES if isinstance(error, kind))
            raise typer.Exit(code) from error
        except KeyboardInterrupt:
            said = "interrupted"
            if command.__name__ == "quantize":
                work = kwargs["work"] or f"{kwargs['out']}.work"
                said += f"; the same command goes on from what lies in {work}"
            typer.echo(f"bitwright: {said}", err=True)
            raise typer.Exit(INTERRUPTED) from None

    return run


@app.command()
@guarded
def quantize(
    src: Source,
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    scheme: SchemeName = None,
    method: Method = None,
    effort: Effort = None,
    format: Format = None,
    calibration: Calibration = None,
    samples: Samples = None,
    length: Length = None,
    recipe: RecipeFile = None,
    threads: Threads = None,
    strict: Strict = False,
    work: Work = None,
    seed: Seed = None,
    chat: Chat = None,
    dtype: ForwardType = None,
    device: ForwardDevice = None,
    memory: Memory = None,
    max_shard_size: ShardSize = "5GB",  # type: ignore[assignment]
    overwrite: Overwrite = False,
    profile: Profile = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Quantize a checkpoint; the same command again resumes an interrupted run."""
    printer = show.Printer(json, quiet)
    names = {"scheme": scheme, "method": method, "effort": effort, "format": format}
    text = {"samples": samples, "length": length, "seed": seed, "chat": chat}
    wish = recipes.merge(recipe, names | text)
    with show.Bars(quiet) as bars:
        report = module.quantize(
            src,
            wish,
            out=out,
            calibration=calibration,
            work=work,
            threads=threads,
            dtype=None if dtype is None else dtype.value,
            device=device,
            memory=memory,
            max_shard_size=max_shard_size,
            strict=strict,
            overwrite=overwrite,
            progress=bars,
        )
    written = checkpoint.Checkpoint(out)
    if profile:
        show.profile(printer, report)
    show.report(printer, report, out, written.total_bytes)
    printer.json(report.to_dict(measured=True))
    printer.line()
    printer.plain("; ".join(papers.load_lines(out, written)))


@app.command(name="plan")
@guarded
def plan_command(
    src: Source,
    scheme: SchemeName = None,
    method: Method = None,
    effort: Effort = None,
    format: Format = None,
    calibration: Calibration = None,
    samples: Samples = None,
    length: Length = None,
    recipe: RecipeFile = None,
    threads: Threads = None,
    strict: Strict = False,  # noqa: ARG001  here and below: taken so that quantize's options fit
    work: Work = None,  # noqa: ARG001
    seed: Seed = None,
    chat: Chat = None,
    dtype: ForwardType = None,
    device: ForwardDevice = None,
    memory: Memory = None,
    max_shard_size: ShardSize = "5GB",  # type: ignore[assignment]  # noqa: ARG001
    overwrite: Overwrite = False,  # noqa: ARG001
    profile: Profile = False,  # noqa: ARG001
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Peak memory, disk, time, each linear's scheme, before anything runs; a config is enough."""
    printer = show.Printer(json, quiet)
    names = {"scheme": scheme, "method": method, "effort": effort, "format": format}
    text = {"samples": samples, "length": length, "seed": seed, "chat": chat}
    wish = recipes.merge(recipe, names | text)
    if calibration is not None:
        data.require_text(calibration)
    made = plan.make(
        hub.resolve(src, config=True),
        wish,
        threads=threads,
        dtype=None if dtype is None else dtype.value,
        device=device,
        memory=memory,
    )
    show.plan(printer, made)
    printer.json(made.to_dict())


@app.command(name="eval")
@guarded
def eval_command(
    base: Annotated[str, typer.Argument(help="The original.")],
    quant: Annotated[str, typer.Argument(help="What is compared with it.")],
    text: Annotated[
        Path | None, typer.Option("--text", help="Text file. [shipped validation text]")
    ] = None,
    windows: Annotated[int, typer.Option("--windows", help="Windows of the text.", min=1)] = 12,
    length: Annotated[int, typer.Option("--length", help="Tokens in a window.", min=2)] = 512,
    card: Annotated[
        bool, typer.Option("--card/--no-card", help="Note the scores in a model card of ours.")
    ] = True,
    device: ForwardDevice = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Perplexity, KL divergence and top-1 agreement of a quantized model with its original."""
    printer = show.Printer(json, quiet)
    folder = hub.resolve(quant)
    ours = card and papers.read(folder) is not None
    with show.Bars(quiet) as bars:
        scores = evaluate.compare(
            hub.resolve(base),
            folder,
            text=text,
            windows=windows,
            length=length,
            device=device,
            progress=bars,
        )
    show.evaluation(printer, scores)
    printer.json(scores.to_dict())
    if ours and papers.record(folder, scores.to_dict()):
        printer.line(f"noted in {folder / 'README.md'}")


@app.command()
@guarded
def inspect(path: Source, json: Json = None, quiet: Quiet = False) -> None:
    """What is in a checkpoint: schemes, sizes, the largest errors its report tells of."""
    printer = show.Printer(json, quiet)
    found = inspection.inspect(hub.resolve(path))
    show.inspection(printer, found)
    printer.json(found.to_dict())


@app.command()
@guarded
def convert(
    out: Annotated[str, typer.Argument(help="A quantized checkpoint.")],
    out2: Annotated[Path, typer.Argument(help="Folder to write.")],
    format: Annotated[str, typer.Option("--format", help="compressed-tensors | gptq | bitwright.")],
    max_shard_size: ShardSize = "5GB",  # type: ignore[assignment]
    overwrite: Overwrite = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """One result in another format, lossless or refused; nothing is solved again."""
    printer = show.Printer(json, quiet)
    with show.Bars(quiet) as bars:
        report = conversion.convert(
            out,
            out2,
            format=format,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            progress=bars,
        )
    for note in report.notes:
        printer.line(f"note: {note}")
    printer.json(report.to_dict())
    printer.plain("; ".join(papers.load_lines(out2, checkpoint.Checkpoint(out2))))


@app.command(name="demo")
@guarded
def demo_command(
    out: Annotated[Path, typer.Argument(help="Folder to write.")] = Path("bitwright-demo"),
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Quantize the embedded model and compare: rounding, GPTQ at 3 bits, GPTQ at 4 bits."""
    printer = show.Printer(json, quiet)
    with show.Bars(quiet) as bars:
        rows = list(demo.run(out, overwrite=True, progress=bars))
    show.demo(printer, rows)
    printer.json([vars(row) | {"evaluation": row.evaluation.to_dict()} for row in rows])
    printer.line()
    printer.plain("; ".join(papers.load_lines(out, checkpoint.Checkpoint(out))))


app.command(name="bench")(guarded(bench.run, models=False))
for _command in (talk.generate, talk.chat):
    app.command()(guarded(_command))


def main() -> None:
    """The `bitwright` command."""
    app(prog_name="bitwright")


if __name__ == "__main__":
    main()
