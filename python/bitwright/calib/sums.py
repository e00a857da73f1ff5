"""Sums over tokens by the C++ core. `calib.device.DeviceSums` does the same on a GPU."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bitwright import ops
from bitwright.spec import F32, F64

Columns = tuple[F64, F32, F32, F32]


class Sums(Protocol):
    """What `calib.stats.StatsCollector` adds with. Arrays are the backend's own, (t, k) of tokens
    and float64 matrices, until `host` hands a matrix over."""

    def take(self, x: Any) -> Any:
        """x as an array of the backend, of any shape."""

    def shaped(self, x: Any, shape: tuple[int, ...]) -> Any:
        """The same, contiguous, in another shape."""

    def zeros(self, shape: tuple[int, ...]) -> Any:
        """A float64 matrix, or several."""

    def gram(self, X: Any, H: Any) -> None:
        """H += X^T X, at least in the upper triangle."""

    def cross(self, before: Any, X: Any, C: Any, after: Any = None) -> None:
        """C += (before - after)^T X; after: None for X."""

    def columns(self, X: Any) -> None:
        """Widens what `column_sums` tells by the rows of X."""

    def column_sums(self) -> Columns:
        """Sum of |x|, largest |x|, smallest and largest x of each column."""

    def host(self, matrix: Any) -> F64:
        """A sum as a NumPy array; the backend's own is not used again."""


class CoreSums:
    """On the CPU. products: as for `ops.gram`."""

    def __init__(self, k: int, products: str | None = None) -> None:
        self.products = products
        self._absolute = np.zeros(k)
        self._abs_max = np.zeros(k, np.float32)
        self._minimum = np.full(k, np.inf, np.float32)
        self._maximum = np.full(k, -np.inf, np.float32)

    def take(self, x: Any) -> npt.NDArray[Any]:
        return ops.as_numpy(x)

    def shaped(self, x: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
        return np.ascontiguousarray(x).reshape(shape)

    def zeros(self, shape: tuple[int, ...]) -> F64:
        return np.zeros(shape)

    def gram(self, X: npt.NDArray[Any], H: F64) -> None:
        ops.gram(X, H, self.products)

    def cross(
        self,
        before: npt.NDArray[Any],
        X: npt.NDArray[Any],
        C: F64,
        after: npt.NDArray[Any] | None = None,
    ) -> None:
        ops.cross(before, X, C, after, self.products)

    def columns(self, X: npt.NDArray[Any]) -> None:
        ops.column_stats(X, self._absolute, self._abs_max, self._minimum, self._maximum)

    def column_sums(self) -> Columns:
        return self._absolute, self._abs_max, self._minimum, self._maximum

    def host(self, matrix: F64) -> F64:
        return matrix
