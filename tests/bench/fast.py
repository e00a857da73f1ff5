"""What int8 activations cost: KL to the original of a quantized folder in `exact` and in `fast`.

    python tests/bench/fast.py BASE OUT [--text FILE ...] [--windows 6]

Windows of 512 tokens of the shipped validation text (or each FILE), the original in float32. Scales
per token and group of at most 128 columns (`group`), and one per token (`token`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import bitwright
from bitwright.calib.data import load_tokenizer, tokenise, validation_text

LENGTH = 512
MODES = {"exact": ("exact", "group"), "fast": ("fast", "group"), "fast, token": ("fast", "token")}


@torch.inference_mode()
def logs(model: torch.nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """Log probabilities of each window."""
    return [model(window[None]).logits[0].float().log_softmax(-1) for window in ids]


def main() -> None:
    """Prints one line per text and mode."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("out")
    parser.add_argument("--text", nargs="*", default=[None])
    parser.add_argument("--windows", type=int, default=6)
    a = parser.parse_args()
    base = AutoModelForCausalLM.from_pretrained(a.base, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(Path(a.base))
    for text in a.text:
        content = validation_text() if text is None else Path(text).read_text(encoding="utf-8")
        ids = tokenise(content, tokenizer, a.windows * LENGTH).reshape(a.windows, LENGTH)
        want, exact = logs(base, torch.from_numpy(ids)), 0.0
        for name, (mode, activations) in MODES.items():
            model = bitwright.load(a.out, mode=mode, activations=activations, dtype="float32")
            found = logs(model, torch.from_numpy(ids))
            kl = sum(
                float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(want, found, strict=True)
            )
            kl /= len(want)
            exact = exact or kl
            print(f"{text or 'shipped'}: {name} {kl:.4f}, {100 * (kl / exact - 1):+.1f} %")


if __name__ == "__main__":
    main()
