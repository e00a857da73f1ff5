"""Text out of a model, as it comes, and how fast it came.

Prefill: from the call to the first new token, tokens of the prompt over seconds. Decode: the tokens
after the first over the seconds they took. Peak memory: of the whole process, imports included.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TextStreamer

from bitwright import ops
from bitwright.calib.data import load_tokenizer
from bitwright.files.hub import resolve
from bitwright.hf.load import load
from bitwright.hf.product import Activations, Mode
from bitwright.spec import InputError

Message = Mapping[str, str]
Emit = Callable[[str], None]


@dataclass(frozen=True)
class Generated:
    """A text and its figures. peak_rss: bytes."""

    text: str
    prompt_tokens: int
    tokens: int
    prefill_seconds: float
    decode_seconds: float
    peak_rss: int

    @property
    def prefill_speed(self) -> float:
        """Tokens of the prompt a second."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_speed(self) -> float:
        """New tokens a second after the first; 0 where there is one."""
        return (self.tokens - 1) / self.decode_seconds if self.tokens > 1 else 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Watch(TextStreamer):
    """Hands text over when its words are whole, and notes when tokens come."""

    def __init__(self, tokenizer: Any, emit: Emit) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.emit, self.parts, self.times = emit, list[str](), list[float]()

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002
        self.parts.append(text)
        self.emit(text)


class Speaker:
    """A quantized folder with its tokenizer, ready to generate. seconds: what loading took."""

    def __init__(
        self,
        path: str | Path,
        *,
        mode: Mode = "fast",
        activations: Activations = "group",
        dtype: str | None = None,
        threads: int | None = None,
        fused: bool = True,
    ) -> None:
        begin, folder = time.perf_counter(), resolve(path)
        torch.set_num_threads(ops.set_threads(threads))
        self.tokenizer = load_tokenizer(folder)
        self.model: PreTrainedModel = load(
            folder, mode=mode, activations=activations, dtype=dtype, fused=fused
        )
        self.folder, self.seconds = folder, time.perf_counter() - begin

    def tell(self, prompt: str, emit: Emit, **settings: Any) -> Generated:
        """What comes after a text; settings as in `_generate`."""
        return self._generate(self.tokenizer(prompt, return_tensors="pt"), emit, **settings)

    def answer(self, messages: Sequence[Message], emit: Emit, **settings: Any) -> Generated:
        """The assistant's next message, by the tokenizer's chat template."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(
                f"[chat] wanted a chat template in {self.folder}, found none; `bitwright generate` "
                "goes on with a text as it is"
            )
        inputs = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return self._generate(inputs, emit, **settings)

    @torch.no_grad()
    def _generate(
        self,
        inputs: Mapping[str, torch.Tensor],
        emit: Emit,
        *,
        tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Generated:
        """At most `tokens` new ones; the likeliest at temperature 0, else drawn."""
        ids = inputs["input_ids"]
        self._require_room(ids.shape[1], tokens)
        watch = _Watch(self.tokenizer, emit)
        drawing: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            torch.manual_seed(seed)
            drawing["temperature"] = temperature
        begin = time.perf_counter()
        generate: Callable[..., Any] = self.model.generate  # type: ignore[assignment]
        generate(
            input_ids=ids, attention_mask=inputs["attention_mask"], max_new_tokens=tokens,
            pad_token_id=self._padding(), streamer=watch, **drawing,
        )  # fmt: skip
        first, last = watch.times[1], watch.times[-1]  # the prompt is put first
        return Generated(
            text="".join(watch.parts),
            prompt_tokens=int(ids.shape[1]),
            tokens=len(watch.times) - 1,
            prefill_seconds=first - begin,
            decode_seconds=last - first,
            peak_rss=peak_rss(),
        )

    def _padding(self) -> int:
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return int(next(token for token in known if token is not None))

    def _require_room(self, prompt: int, tokens: int) -> None:
        config = self.model.config.get_text_config()
        longest = int(getattr(config, "max_position_embeddings", 0) or sys.maxsize)
        if not 1 <= prompt <= longest - tokens:
            raise InputError(
                f"[generate] wanted a prompt of 1 to {longest - tokens} tokens beside {tokens} new "
                f"ones, got {prompt}"
            )


def peak_rss() -> int:
    """The most memory that this process has had, bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
