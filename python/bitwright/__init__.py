"""Quantize language models after training, on the computer you have, for the engine you use.

    quantize(model_or_path, ...)          a checkpoint folder, a hub id, or a model in memory
    compare(base, quantized, ...)         perplexity and KL divergence to the original
    load(path)                            a quantized folder as a transformers model, on CPU kernels
    convert(path, out, format=...)        one result in another format, lossless or refused
    quantize_matrix(W, H, scheme=...)     one matrix, NumPy or torch
    StatsCollector(k).update(x).finish()  what the solver wants to know of a layer's inputs

Names are resolved when first used: the NumPy part works without torch.

OpenMP's waiting policy is read when its library is loaded, by torch or by our core; where nobody
has set one it becomes passive here, because spinning threads starve each other on small virtual
machines. A process that imports torch before bitwright keeps the library's own.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

_HOMES = {
    "quantize": "module",
    "compare": "evaluate",
    "convert": "conversion",
    "load": "hf",
    "quantize_matrix": "matrix",
    "StatsCollector": "calib.stats",
    "parse_scheme": "schemes",
    "set_threads": "ops",
    "BitwrightError": "spec",
    "InputError": "spec",
    "NumericalError": "spec",
    "Override": "spec",
    "QTensor": "spec",
    "Recipe": "spec",
    "RefusedError": "spec",
    "Report": "spec",
    "Scheme": "spec",
    "Stats": "spec",
    "VerificationError": "spec",
}
_SPELLED = {"parse_scheme": "parse"}  # where a name is longer out here

__all__ = [*_HOMES, "__version__"]  # noqa: PLE0604  all of them are text


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("bitwright")
    if name not in _HOMES:
        raise AttributeError(f"module 'bitwright' has no attribute {name!r}")
    return getattr(import_module(f"bitwright.{_HOMES[name]}"), _SPELLED.get(name, name))


def __dir__() -> list[str]:
    return sorted(__all__)
