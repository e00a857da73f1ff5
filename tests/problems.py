"""Random layers for the tests of the core: weights, correlated inputs and their Gram matrix."""

from __future__ import annotations

import platform
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np

from bitwright import ops, schemes
from bitwright.spec import QTensor, Scheme, Stats
from ref.quadratic import quadratic

UNIT = 2.0**-24  # unit roundoff of float32
DOUBLE = 2.0**-53
FUSED = ops.isa() != "base" or platform.machine() not in {"x86_64", "AMD64"}  # the level has FMA


# (rows, columns, group): panels hold 12, 24 or 48 rows, blocks 48 columns, words 32 bits.
SHAPES = [
    (1, 1, 1),
    (1, 7, 3),
    (5, 1, 4),
    (11, 40, 16),
    (24, 48, 48),
    (47, 49, 32),
    (49, 97, 10),
    (97, 145, 64),
]


def assert_equal(ours: Any, twin: Any) -> None:
    for a, b in zip(ours, twin, strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


def rng(*seed: object) -> np.random.Generator:
    """A generator for these words: the same in every process."""
    return np.random.default_rng(zlib.crc32(repr(seed).encode()))


def weights(n: int, k: int, *seed: object) -> np.ndarray:
    """Student-t weights of unequal rows, as trained layers have them."""
    g = rng("weights", n, k, *seed)
    return (g.standard_t(5, (n, k)) * g.uniform(0.01, 0.1, (n, 1))).astype(np.float32)


def inputs(t: int, k: int, *seed: object) -> np.ndarray:
    """Gaussian inputs with correlated columns of unequal size."""
    g = rng("inputs", t, k, *seed)
    mix = np.eye(k) + g.standard_normal((k, k)) * (0.7 / np.sqrt(k))
    return (g.standard_normal((t, k)) @ mix * g.lognormal(0, 0.7, k)).astype(np.float32)


def hessian(k: int, *seed: object, t: int | None = None) -> np.ndarray:
    X = inputs(t or 4 * k + 8, k, *seed).astype(np.float64)
    return X.T @ X / len(X)


def stats(H: np.ndarray, tokens: int = 1 << 20) -> Stats:
    """Stats of inputs with this H (the column statistics are what a Gaussian would give)."""
    size = np.sqrt(np.maximum(np.diagonal(H), 0)).astype(np.float32)
    return Stats(tokens, H, size * np.float32(0.8), 4 * size, -4 * size, 4 * size)


def scheme(bits: int, group: int, symmetric: bool = True, **more: Any) -> Scheme:
    return Scheme(schemes.grids()[f"int{bits}"], group, symmetric, **more)


def as_words(q: QTensor) -> ops.QWords:
    """The same matrix, its codes packed."""
    words = ops.pack(q.codes, q.scheme.bits)
    k, scheme = q.shape[1], q.scheme
    return ops.QWords(words, k, q.scales, q.zeros, scheme, q.global_scale, q.steps, q.order)


def random_codes(n: int, k: int, s: Scheme, *seed: object) -> tuple[np.ndarray, ...]:
    """Codes, scales on the scheme's grid, zero points."""
    g = rng("codes", n, k, s.name, *seed)
    G = s.groups(k)
    codes = g.integers(0, len(s.grid.values), (n, k), dtype=np.uint8)
    scales = np.ldexp(g.integers(128, 256, (n, G)), -14).astype(np.float32)
    if s.scale == "e8m0":
        scales = np.exp2(g.integers(-9, -4, (n, G))).astype(np.float32)
    if s.scale == "e4m3":  # over a global scale of 2^12
        scales = np.ldexp(g.integers(8, 15, (n, G)), -12).astype(np.float32)
        scales[0, 0] = np.ldexp(448, -12)
    zeros = np.full((n, G), 2 ** (s.bits - 1) if s.grid.uniform else 0, np.uint8)
    if s.offset:
        offsets = (scales * g.integers(0, 2**s.bits - 1, (n, G))).astype(ml_dtypes.bfloat16)
        return codes, scales, offsets.astype(np.float32)
    if not s.symmetric:
        zeros = g.integers(s.zero_min, 2**s.bits, (n, G), dtype=np.uint8)
    return codes, scales, zeros


def groups_together(k: int, group: int) -> np.ndarray:
    """An order that keeps the columns of each group together, groups and columns shuffled."""
    g = rng("groups", k, group)
    starts = g.permutation(range(0, k, group))
    parts = [first + g.permutation(min(group, k - first)) for first in starts]
    return np.concatenate(parts).astype(np.int32)


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = ops.threads()
    ops.set_threads(n)
    try:
        yield
    finally:
        ops.set_threads(before)


def quadratic_limit(E: np.ndarray, H: np.ndarray) -> float:
    """float32 chains along k and the rounding of H to float32: (k + 2) u |E| |H| |E|^T."""
    return (len(H) + 2) * UNIT * quadratic(np.abs(E), np.abs(H))
