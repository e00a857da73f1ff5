"""Options of the command line that more than one command takes."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from bitwright.registry import METHODS

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class Dtype(StrEnum):
    """Of the calibration forward."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def byte_count(text: str) -> int:
    """A size such as 5GB, 500MB or 123456, in decimal units; BadParameter if it is none."""
    number = text.strip().upper().removesuffix("B")
    unit = number[-1:] if number[-1:] in UNITS else ""
    try:
        count = int(float(number.removesuffix(unit)) * UNITS[unit])
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise typer.BadParameter(f"wanted a size like 5GB or 500MB, got {text!r}")
    return count


Source = Annotated[str, typer.Argument(help="Checkpoint folder, or a hub id like org/name.")]
SchemeName = Annotated[
    str | None,
    typer.Option(
        "--scheme",
        help="int<bits>-g<group>|channel|tensor[-asym|-offset], nf4-g64, mxfp4 ... [int4-g64]",
    ),
]
Method = Annotated[str | None, typer.Option("--method", help=f"{' | '.join(METHODS)}. [gptq]")]
Effort = Annotated[
    str | None,
    typer.Option("--effort", help="fast (plain GPTQ) | default | max (slower). [default]"),
]
Format = Annotated[
    str | None,
    typer.Option("--format", help="compressed-tensors | gptq | bitwright. [compressed-tensors]"),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        "--calibration", help="Text or JSONL file, or a shipped text: mixed, books. [mixed]"
    ),
]
Samples = Annotated[int | None, typer.Option("--samples", help="Calibration windows. [128]", min=1)]
Length = Annotated[int | None, typer.Option("--length", help="Tokens in a window. [512]", min=2)]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="YAML or JSON recipe; options win over it.")
]
Threads = Annotated[
    int | None, typer.Option("--threads", help="Of the C++ core. [all CPUs]", min=1)
]
Seed = Annotated[int | None, typer.Option("--seed", help="Order of drawn samples. [0]")]
Chat = Annotated[
    bool | None, typer.Option("--chat/--no-chat", help="Put texts into the chat template.")
]
ForwardType = Annotated[
    Dtype | None,
    typer.Option("--dtype", help="Of the calibration forward. [bfloat16 where it is the faster]"),
]
ForwardDevice = Annotated[
    str | None,
    typer.Option("--device", help="Of forward and sums: cpu | cuda. [a GPU where torch has one]"),
]
Memory = Annotated[
    int | None,
    typer.Option(
        "--memory", parser=byte_count, help="What the run may take. [80% of what is free]"
    ),
]
ShardSize = Annotated[
    int,
    typer.Option("--max-shard-size", parser=byte_count, help="Largest weight file."),
]
Strict = Annotated[bool, typer.Option("--strict", help="A fallback is an error.")]
Work = Annotated[
    Path | None, typer.Option("--work", help="Folder for what is finished. [OUT.work]")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a finished result of ours.")]
Json = Annotated[str | None, typer.Option("--json", help="Also as JSON to this file; -: stdout.")]
Profile = Annotated[bool, typer.Option("--profile", help="Where each block's time went.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars, no tables.")]
