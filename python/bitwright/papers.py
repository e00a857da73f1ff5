"""The report and the model card that lie in a folder of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitwright import card, registry, report
from bitwright.export import REPORT, write_json
from bitwright.files import safetensors
from bitwright.files.checkpoint import Checkpoint, read_json
from bitwright.report import RunReport

HOMES = {  # of the names in a load line
    "AutoModelForCausalLM": "transformers",
    "CompressedTensorsConfig": "transformers",
    "GPTQModel": "gptqmodel",
}


def load_lines(folder: Path, checkpoint: Checkpoint) -> tuple[str, str]:
    """The code that loads a quantized checkpoint which is to lie at `folder`: import and call."""
    method = checkpoint.config["quantization_config"]["quant_method"]
    call = registry.get("formats", method).load_line(folder, checkpoint.config)
    if call.startswith("bitwright."):
        return "import bitwright", f"model = {call}"
    names = [name for name in HOMES if name in call]
    return f"from {HOMES[names[0]]} import {', '.join(names)}", f"model = {call}"


def write(folder: Path, result: RunReport, out: Path) -> None:
    """Writes both into `folder`, which is to lie at `out`."""
    checkpoint = Checkpoint(folder)
    write_json(folder / REPORT, result.to_dict())
    text = card.render(
        result, bytes_total=checkpoint.total_bytes, load_lines=load_lines(out, checkpoint)
    )
    safetensors.write_text(folder / "README.md", text)


def read(folder: Path) -> RunReport | None:
    """The report of a folder of ours, None for any other folder."""
    path = folder / REPORT
    return report.from_dict(read_json(path)) if path.is_file() else None


def record(folder: Path, scores: dict[str, Any]) -> bool:
    """Notes an evaluation in report and card; False where `folder` is not ours."""
    known = read(folder)
    if known is None:
        return False
    write(folder, known.with_evaluation(scores), folder)
    return True
