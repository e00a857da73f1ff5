"""`bitwright generate` and `bitwright chat`: a quantized folder, run.

Text goes to standard output as it comes, figures to standard error. In a chat an empty line or the
end of the input ends it.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from bitwright.deferred import Deferred
from bitwright.errors import InputError

if TYPE_CHECKING:
    from bitwright import show
    from bitwright.hf import generation
else:
    show, generation = Deferred("bitwright.show"), Deferred("bitwright.hf.generation")


class Mode(StrEnum):
    """Of the products."""

    fast = "fast"
    exact = "exact"


class Dtype(StrEnum):
    """Of everything but the quantized weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"


Folder = Annotated[str, typer.Argument(help="A quantized checkpoint, or a hub id.")]
Tokens = Annotated[int, typer.Option("--tokens", help="New tokens at most.", min=1)]
HowExact = Annotated[
    Mode, typer.Option("--mode", help="fast rounds activations to 8 bits, exact does not.")
]
ForwardType = Annotated[Dtype | None, typer.Option("--dtype", help="[the checkpoint's]")]
Temperature = Annotated[
    float, typer.Option("--temperature", help="0: the likeliest token, always.", min=0.0)
]
Seed = Annotated[int, typer.Option("--seed", help="Of drawn tokens.")]
Threads = Annotated[int | None, typer.Option("--threads", help="[all CPUs]", min=1)]
Fused = Annotated[
    bool, typer.Option("--fused/--no-fused", help="Decoder layers in one call where they can.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No figures.")]


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _figures(to: show.Printer, done: generation.Generated, loading: float) -> None:
    to.facts(
        [
            ("loaded", f"in {loading:.1f} s"),
            ("prefill", f"{done.prompt_tokens} tokens, {done.prefill_speed:.1f} tokens/s"),
            ("decode", f"{done.tokens} tokens, {done.decode_speed:.1f} tokens/s"),
            ("peak memory", show.size(done.peak_rss)),
        ]
    )


def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to go on with; -: standard input.")],
    tokens: Tokens = 256,
    mode: HowExact = Mode.fast,
    dtype: ForwardType = None,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    threads: Threads = None,
    fused: Fused = True,
    json: Annotated[str | None, typer.Option("--json", help="Text and figures to a file.")] = None,
    quiet: Quiet = False,
) -> None:
    """Go on with a text; tokens a second, peak memory."""
    if json == "-":
        raise InputError("[json] wanted a file, got -: standard output has the text")
    printer, figures = show.Printer(json), show.Printer("-", quiet)
    text = sys.stdin.read() if prompt == "-" else prompt
    speaker = generation.Speaker(folder, mode=mode.value, dtype=dtype, threads=threads, fused=fused)
    done = speaker.tell(text, _say, tokens=tokens, temperature=temperature, seed=seed)
    _say("\n")
    _figures(figures, done, speaker.seconds)
    printer.json({"load_seconds": speaker.seconds, **done.to_dict()})


def chat(
    folder: Folder,
    system: Annotated[str | None, typer.Option("--system", help="First message, if any.")] = None,
    tokens: Tokens = 512,
    mode: HowExact = Mode.fast,
    dtype: ForwardType = None,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    threads: Threads = None,
    fused: Fused = True,
    quiet: Quiet = False,
) -> None:
    """Talk with a model, by its chat template; an empty line ends it."""
    figures = show.Printer("-", quiet)
    speaker = generation.Speaker(folder, mode=mode.value, dtype=dtype, threads=threads, fused=fused)
    messages = [{"role": "system", "content": system}] if system else []
    while (line := _line()) is not None:
        messages.append({"role": "user", "content": line})
        done = speaker.answer(messages, _say, tokens=tokens, temperature=temperature, seed=seed)
        messages.append({"role": "assistant", "content": done.text})
        _say("\n")
        _figures(figures, done, speaker.seconds)


def _line() -> str | None:
    """What the user says; None: no more."""
    if sys.stdin.isatty():
        sys.stderr.write("> ")
        sys.stderr.flush()
    return sys.stdin.readline().strip() or None
