"""One quantization run, in a module of its own so that a fork server can start it many times."""

from __future__ import annotations

import bitwright
from bitwright.demo import embedded_model


def run(out: str, method: str) -> None:
    """The embedded model into `out`."""
    bitwright.quantize(
        embedded_model(), out=out, scheme="int3-g64", method=method, samples=12, length=128
    )
