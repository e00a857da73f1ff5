"""How far a quantized model is from its original: perplexity and KL divergence on the same text.

    KL = sum_v p(v) (log p(v) - log q(v)) in nats, p the original; mean, median, 99 % over all
    positions perplexity = exp(mean negative log-likelihood of the next token) over all but the last
    position

The text is tokenised without special tokens and cut into its first `windows` consecutive windows.
Both models run in float32, block by block from disk: memory holds one block, the hidden states, the
heads and a few hundred rows of logits.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bitwright import ops
from bitwright.calib import device as devices
from bitwright.calib import precision
from bitwright.calib.data import load_tokenizer, tokenise, validation_text
from bitwright.calib.skeleton import Skeleton, longest_window
from bitwright.files.checkpoint import Checkpoint
from bitwright.files.hub import resolve
from bitwright.formats.dense import dense
from bitwright.pool import limited
from bitwright.progress import Progress, silent
from bitwright.spec import InputError

POSITIONS = 256  # rows of logits in memory at a time
TOKENS_PER_BATCH = 2048  # of one forward call


@dataclass(frozen=True)
class Evaluation:
    """A comparison. KL in nats; top1: share of positions with the same most likely token;
    bits_per_weight: of the quantized matrices, scales and zero points included; seconds per
    forward."""

    base: str
    quantized: str
    text: str
    tokens: int
    perplexity_base: float
    perplexity: float
    kl_mean: float
    kl_median: float
    kl_p99: float
    top1: float
    bytes_base: int
    bytes: int
    bits_per_weight: float
    seconds_base: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def windows_of(text: str, folder: Path, windows: int, length: int) -> npt.NDArray[np.int64]:
    """Token ids (windows, length) of the start of `text`; InputError if it is too short."""
    want = windows * length
    ids = tokenise(text, load_tokenizer(folder), want)
    if len(ids) < want:
        raise InputError(
            f"[evaluate] wanted {windows} windows of {length} = {want} tokens, the text has "
            f"{len(ids)}"
        )
    return ids.reshape(windows, length)


class _Model:
    """One checkpoint, streamed."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.checkpoint = Checkpoint(path)
        self.view = dense(self.checkpoint)
        shapes = {name: self.view.shape(name) for name in self.view.names()}
        self.skeleton = Skeleton(path, self.view.read, shapes, "float32", device=device)
        self.seconds = 0.0

    def hidden(self, ids: npt.NDArray[np.int64], progress: Progress) -> list[torch.Tensor]:
        """Outputs of the last block, batch by batch."""
        begin = time.perf_counter()
        size = max(1, TOKENS_PER_BATCH // ids.shape[1])
        batches = [self.skeleton.embed(ids[i : i + size]).cpu() for i in range(0, len(ids), size)]
        self.skeleton.empty()
        for i in range(self.skeleton.count):
            with self.skeleton.block(i):
                batches = [self.skeleton.forward_block(i, batch).cpu() for batch in batches]
            progress.advance()
        devices.settle(self.skeleton.device)
        self.seconds += time.perf_counter() - begin
        return batches

    def longest(self) -> int:
        return longest_window(self.skeleton) or sys.maxsize

    def vocabulary(self) -> int:
        slot = self.skeleton.slots[f"{self.skeleton.embeddings}.weight"]
        return int(slot.meta.shape[0])

    def bits_per_weight(self) -> float:
        """Stored bits of the quantized modules over their weights; 0 for a float checkpoint."""
        modules = self.view.modules
        stored = sum(
            entry[2]
            for name, entry in self.checkpoint.entries.items()
            if self.view.owner(name) is not None and not name.endswith(".g_idx")
        )
        weights = sum(math.prod(self.view.shape(f"{module}.weight")) for module in modules)
        return 8 * stored / weights if weights else 0.0


def _chunks(
    first: list[torch.Tensor], second: list[torch.Tensor]
) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
    row = 0
    for a, b in zip(first, second, strict=True):
        for i in range(a.shape[0]):
            for begin in range(0, a.shape[1], POSITIONS):
                cut = slice(begin, begin + POSITIONS)
                yield row + i, begin, a[i : i + 1, cut], b[i : i + 1, cut]
        row += a.shape[0]


@torch.inference_mode()
def _score(
    base: _Model, quant: _Model, ids: npt.NDArray[np.int64], progress: Progress
) -> dict[str, Any]:
    progress.start(base.skeleton.count + quant.skeleton.count, "evaluate")
    pairs = _chunks(base.hidden(ids, progress), quant.hidden(ids, progress))
    kl: list[npt.NDArray[np.float64]] = []
    loss, same, scored = np.zeros(2), 0, 0
    for row, begin, a, b in pairs:
        p = base.skeleton.logits(a)[0].float().log_softmax(-1)
        q = quant.skeleton.logits(b)[0].float().log_softmax(-1)
        kl.append((p.exp() * (p - q)).sum(-1, dtype=torch.float64).cpu().numpy())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        following = torch.from_numpy(ids[row, begin + 1 : begin + 1 + len(p)]).to(p.device)
        at = torch.arange(len(following), device=p.device)
        loss -= [float(x[at, following].sum(dtype=torch.float64)) for x in (p, q)]
        scored += len(following)
    divergence = np.concatenate(kl)
    if not np.isfinite(divergence).all():
        raise InputError("[evaluate] wanted finite logits from both models, got NaN or infinity")
    ppl = np.exp(loss / scored)
    return {
        "perplexity_base": float(ppl[0]),
        "perplexity": float(ppl[1]),
        "kl_mean": float(divergence.mean()),
        "kl_median": float(np.median(divergence)),
        "kl_p99": float(np.quantile(divergence, 0.99)),
        "top1": same / divergence.size,
    }


@devices.guarded()
def compare(
    base: str | Path,
    quant: str | Path,
    *,
    text: str | Path | None = None,
    ids: npt.NDArray[np.int64] | None = None,
    windows: int = 12,
    length: int = 512,
    device: str | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Compares two checkpoints, folders or hub ids, on a text file (None: the shipped validation
    text), or on token ids (N, length) in its place. device: "cpu" or "cuda" (None: a GPU where
    torch has one)."""
    content = validation_text() if text is None else _read_text(Path(text))
    place = devices.choose(device)
    original, other = (_Model(resolve(one), place) for one in (base, quant))
    what = "the shipped validation text" if text is None else str(text)
    if ids is None:
        ids = windows_of(content, original.checkpoint.path, windows, length)
    else:
        ids, what = np.asarray(ids, np.int64), "given token ids"
    sizes = [model.vocabulary() for model in (original, other)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"[evaluate] wanted models with one vocabulary, got {sizes[0]} tokens in {base} and "
            f"{sizes[1]} in {quant}"
        )
    longest = min(model.longest() for model in (original, other))
    if ids.shape[1] > longest:
        raise InputError(
            f"[evaluate] wanted windows of at most {longest} tokens, what the models take, got "
            f"{ids.shape[1]}"
        )
    threads = min(ops.threads(), torch.get_num_threads())
    with limited(threads), precision.products("float32", place.type):
        scores = _score(original, other, ids, progress)
    return Evaluation(
        base=str(base),
        quantized=str(quant),
        text=what,
        tokens=ids.size,
        bytes_base=original.checkpoint.total_bytes,
        bytes=other.checkpoint.total_bytes,
        bits_per_weight=other.bits_per_weight(),
        seconds_base=original.seconds,
        seconds=other.seconds,
        **scores,
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"[evaluate] could not read the text {path}: {error}") from error
