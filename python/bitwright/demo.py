"""The main job on what the package carries: its tiny model, the text of its kind."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from bitwright import evaluate, papers
from bitwright.evaluate import Evaluation
from bitwright.module import quantize
from bitwright.progress import Progress, silent

RUNS = (("int3-g64", "rtn"), ("int3-g64", "gptq"), ("int4-g64", "gptq"))  # the last one is kept


@dataclass(frozen=True)
class Shown:
    """One row of the comparison; seconds: of quantizing, without the evaluation."""

    scheme: str
    method: str
    seconds: float
    evaluation: Evaluation


def embedded_model() -> Path:
    """Folder of the tiny model in the package: Llama type, 5.2M parameters, with its tokenizer."""
    return Path(str(resources.files("bitwright") / "data" / "tiny"))


def run(out: Path, overwrite: bool = False, progress: Progress = silent) -> Iterator[Shown]:
    """Quantizes the embedded model three ways, compared with it; the last stays in `out`."""
    base = embedded_model()
    with tempfile.TemporaryDirectory(prefix="bitwright-") as scratch:
        for i, (scheme, method) in enumerate(RUNS):
            last = i + 1 == len(RUNS)
            folder = out if last else Path(scratch) / str(i)
            begin = time.perf_counter()
            quantize(
                base,
                out=folder,
                scheme=scheme,
                method=method,
                calibration="books",  # all that the embedded model knows
                overwrite=last and overwrite,
                progress=progress,
            )
            seconds = time.perf_counter() - begin
            scores = evaluate.compare(base, folder, progress=progress)
            if last:
                papers.record(folder, scores.to_dict())
            yield Shown(scheme, method, seconds, scores)
