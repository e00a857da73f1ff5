"""How fast a model runs: one contender of `bitwright bench DIR`, in a process of its own.

    python -m bitwright.hf.speed '{"folder": ..., "engine": "bitwright", ...}'     -> JSON

engine "bitwright": the folder on our kernels; "torch": a float folder under transformers;
"dequantized": the folder's weights as floats in torch, for want of the original. Prefill: one
forward of a prompt, logits of its last token. Decode: greedy `generate` with its cache, the tokens
after the first. The best of `repeats`. Peak memory is the process's, imports included.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from bitwright import ops
from bitwright.calib import hollow
from bitwright.files.checkpoint import Checkpoint
from bitwright.hf.generation import peak_rss
from bitwright.hf.load import load
from bitwright.hf.quantizer import quant_linears

ENGINES = ("bitwright", "torch", "dequantized")
CHUNK = 1 << 24


@dataclass(frozen=True)
class Wish:
    """A contender and what it is asked for. mode, fused: of ours. prompt: tokens of the prefill;
    context, tokens: before and of the decode. cpu: seconds are the process's own, for one thread
    on a machine that others use as well."""

    folder: str
    engine: str = "bitwright"
    dtype: str = "bfloat16"
    mode: str = "fast"
    fused: bool = True
    threads: tuple[int, ...] = (1,)
    prompt: int = 512
    context: int = 128
    tokens: int = 64
    repeats: int = 3
    cpu: bool = False

    @property
    def clock(self) -> Callable[[], float]:
        return time.process_time if self.cpu else time.perf_counter


@dataclass(frozen=True)
class Speed:
    """Tokens a second on so many threads."""

    threads: int
    prefill: float
    decode: float


@dataclass(frozen=True)
class Measured:
    """load_seconds: of loading, imports not counted; read_seconds: of the files' bytes, just before
    they were loaded; bytes: of the files."""

    speeds: tuple[Speed, ...]
    load_seconds: float
    read_seconds: float
    bytes: int
    peak_rss: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Times(BaseStreamer):
    """When tokens came."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.times = clock, list[float]()

    def put(self, value: torch.Tensor) -> None:  # noqa: ARG002
        self.times.append(self.clock())

    def end(self) -> None:
        pass


def read(folder: Path) -> tuple[float, int]:
    """Seconds that reading a checkpoint's files takes, and their bytes."""
    begin, total = time.perf_counter(), 0
    for file in Checkpoint(folder).files:
        with Path(file).open("rb", buffering=0) as stream:
            while part := stream.read(CHUNK):
                total += len(part)
    return time.perf_counter() - begin, total


def import_model(folder: str) -> None:
    """Import the class of a folder's model, as transformers does when it is first asked for."""
    known: Any = AutoModelForCausalLM._model_mapping
    known.get(type(hollow.read_config(Path(folder))), None)


def open_model(wish: Wish) -> PreTrainedModel:
    """The contender's model."""
    if wish.engine == "torch":
        from_pretrained: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_pretrained
        return from_pretrained(wish.folder, dtype=wish.dtype, local_files_only=True)
    mode: Any = wish.mode
    model = load(wish.folder, mode=mode, dtype=wish.dtype, fused=wish.fused)
    if wish.engine == "dequantized":
        for name, layer in list(quant_linears(model)):
            linear: Any
            with torch.device("meta"):
                linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            weight = layer.dequantize()
            if layer.ordered:
                weight = weight[:, torch.argsort(layer.order)]
            linear.weight = nn.Parameter(weight.to(getattr(torch, wish.dtype)), False)
            linear.bias = layer.bias
            model.set_submodule(name, linear.train(False))
    return model


def _ids(model: PreTrainedModel, count: int) -> torch.Tensor:
    """Tokens of no meaning: time does not depend on them."""
    size = int(model.config.get_text_config().vocab_size)
    return torch.randint(0, size, (1, count), generator=torch.Generator().manual_seed(0))


def _prefill(model: PreTrainedModel, count: int, clock: Callable[[], float]) -> float:
    ids, begin = _ids(model, count), clock()
    model(input_ids=ids, use_cache=True, logits_to_keep=1)
    return count / (clock() - begin)


def _decode(model: PreTrainedModel, context: int, tokens: int, clock: Callable[[], float]) -> float:
    generate: Callable[..., Any] = model.generate  # type: ignore[assignment]
    ids, came = _ids(model, context), _Times(clock)
    generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens + 1,
        do_sample=False, streamer=came, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    _, first, *rest = came.times  # the prompt is put first
    return len(rest) / (rest[-1] - first)


@torch.no_grad()
def speed(model: PreTrainedModel, wish: Wish, threads: int) -> Speed:
    """Of a model in this process."""
    torch.set_num_threads(ops.set_threads(threads))
    model.generation_config.eos_token_id = None
    longest = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 1 << 30)
    prompt = min(wish.prompt, longest)
    context = min(wish.context, max(longest - wish.tokens - 1, 1))
    tokens = max(min(wish.tokens, longest - context - 1), 1)
    return Speed(
        threads,
        max(_prefill(model, prompt, wish.clock) for _ in range(wish.repeats)),
        max(_decode(model, context, tokens, wish.clock) for _ in range(wish.repeats)),
    )


def measure(wish: Wish) -> Measured:
    """Load the contender and time it."""
    torch.set_num_threads(ops.set_threads(max(wish.threads)))
    reading, count = read(Path(wish.folder))
    import_model(wish.folder)
    begin = time.perf_counter()
    model = open_model(wish)
    loading = time.perf_counter() - begin
    speeds = tuple(speed(model, wish, n) for n in wish.threads)
    return Measured(speeds, loading, reading, count, peak_rss())


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    made = measure(Wish(**{**told, "threads": tuple(told["threads"])}))
    sys.stdout.write(json.dumps(made.to_dict()) + "\n")
