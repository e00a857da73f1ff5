"""How torch multiplies float32 in the forward: "medium" where a probe shows that it stays float32.

torch's own choice goes through a library that is slow on some processors (measured, one core: 91
GFLOP/s, with "medium" 225). "medium" also allows bf16 products, which other processors then use; so
x W^T is compared with float64 first, and where an element is off by more than 1e-6 of |x| |W|^T
(float32 sums: about 1e-7, bf16 products: about 1e-4) the setting stays as it was. On a GPU "medium"
and "high" mean TF32, and float32 stays float32: "highest".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

LIMIT = 1e-6
PROBE = (512, 1024, 512)


def _error() -> float:
    """Largest error of x W^T relative to |x| |W|^T, under the setting in force."""
    tokens, k, n = PROBE
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(rows, k, generator=generator) for rows in (tokens, n))
    exact, size = x.double() @ W.double().T, x.abs().double() @ W.abs().double().T
    return float(((torch.nn.functional.linear(x, W) - exact).abs() / size).max())


@cache
def choice(dtype: str, device: str = "cpu") -> str | None:
    """The setting for a forward in `dtype`: "medium", or None where torch's own stays; on a GPU
    "highest"."""
    if device != "cpu":
        return "highest"
    if dtype != "float32":
        return None
    with setting("medium"):
        return "medium" if _error() <= LIMIT else None


@contextmanager
def setting(name: str) -> Iterator[None]:
    """torch's float32 products inside, as they were set afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def products(dtype: str, device: str = "cpu") -> Iterator[None]:
    """The chosen setting inside, the one before afterwards."""
    with setting(choice(dtype, device) or torch.get_float32_matmul_precision()):
        yield
