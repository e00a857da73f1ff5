"""Who else does the same algebra: torch, OpenBLAS (package scipy-openblas32, the bench extra) and
Eigen (built on request: -C cmake.define.BITWRIGHT_EIGEN=ON). Each is None where it is missing.

OpenBLAS is called through its own C interface, prefix `scipy_`. OPENBLAS_CORETYPE would choose its
kernels for another processor and OPENBLAS_L2_SIZE their blocks: both are taken out of this
process's environment before the library is loaded, and `OpenBlas.core` says which kernels run.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.spec import F32, F64

OVERRIDES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
ROW_MAJOR, UPPER, LOWER, NO, YES = 101, 121, 122, 111, 112  # CBLAS
LEFT_SIDE, RIGHT_SIDE, NON_UNIT = 141, 142, 131


def _at(x: F32 | F64) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.ctypes.data)


class OpenBlas:
    """The few routines that our ops have a counterpart for; matrices are row-major."""

    def __init__(self, path: Path) -> None:
        for name in OVERRIDES:
            os.environ.pop(name, None)
        self._library = ctypes.CDLL(str(path))
        self._library.scipy_openblas_get_corename.restype = ctypes.c_char_p
        self.core: str = self._library.scipy_openblas_get_corename().decode()

    @classmethod
    def find(cls) -> OpenBlas | None:
        if find_spec("scipy_openblas32") is None:
            return None
        package = import_module("scipy_openblas32")
        return cls(Path(package.get_lib_dir()) / package.get_library(fullname=True))

    def set_threads(self, n: int) -> None:
        self._library.scipy_openblas_set_num_threads(n)

    def gram(self, X: F32, H: F32) -> None:
        """H += X^T X, upper triangle."""
        t, k = X.shape
        one = ctypes.c_float(1.0)
        self._library.scipy_cblas_ssyrk(ROW_MAJOR, UPPER, YES, k, t, one, _at(X), k, one, _at(H), k)

    def product(self, A: F32, B: F32, C: F32, turned: bool = False) -> None:
        """C = A B, or A^T B."""
        rows, k, depth = C.shape[0], C.shape[1], B.shape[0]
        one, none = ctypes.c_float(1.0), ctypes.c_float(0.0)
        self._library.scipy_cblas_sgemm(
            *(ROW_MAJOR, YES if turned else NO, NO, rows, k, depth, one),
            *(_at(A), A.shape[1], _at(B), k, none, _at(C), k),
        )

    def solve(self, R: F32, X: F32, turned: bool) -> None:
        """X = X R^-1, or X R^-T, R upper triangular."""
        n, k = X.shape
        self._library.scipy_cblas_strsm(
            *(ROW_MAJOR, RIGHT_SIDE, UPPER, YES if turned else NO, NON_UNIT, n, k),
            *(ctypes.c_float(1.0), _at(R), k, _at(X), k),
        )

    def cholesky(self, H: F64) -> None:
        """H becomes its factor, in place."""
        k = len(H)
        size, info = ctypes.c_int(k), ctypes.c_int(0)
        self._library.scipy_dpotrf_(
            *(ctypes.c_char_p(b"L"), ctypes.byref(size), _at(H), ctypes.byref(size)),
            *(ctypes.byref(info), ctypes.c_size_t(1)),
        )


class Eigen:
    """Eigen's products, compiled for this machine (csrc/eigen/eigen.cpp)."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.eigen_simd.restype = ctypes.c_char_p
        self.core: str = self._library.eigen_simd().decode()

    @classmethod
    def find(cls) -> Eigen | None:
        spec = find_spec("bitwright._core")
        beside = Path(spec.origin).parent / "_eigen.so" if spec and spec.origin else None
        return cls(beside) if beside and beside.exists() else None

    def set_threads(self, n: int) -> None:
        self._library.eigen_threads(n)

    def gram(self, X: F32, H: F32) -> None:
        sizes = (ctypes.c_int64(n) for n in X.shape)
        self._library.eigen_gram(*sizes, _at(X), _at(H))

    def product(self, A: F32, B: F32, C: F32) -> None:
        sizes = (ctypes.c_int64(n) for n in (*A.shape, B.shape[1]))
        self._library.eigen_product(*sizes, _at(A), _at(B), _at(C))

    def cholesky(self, H: F64) -> None:
        self._library.eigen_cholesky(ctypes.c_int64(len(H)), _at(H))


class Torch:
    """torch's matrix algebra at a precision setting that holds only inside `at`."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch
        self.core = str(torch.backends.cpu.get_cpu_capability())

    @classmethod
    def find(cls) -> Torch | None:
        return None if find_spec("torch") is None else cls(import_module("torch"))

    def set_threads(self, n: int) -> None:
        self.torch.set_num_threads(n)

    @contextmanager
    def at(self, precision: str) -> Iterator[Any]:
        before = self.torch.get_float32_matmul_precision()
        self.torch.set_float32_matmul_precision(precision)
        try:
            with self.torch.inference_mode():
                yield self.torch
        finally:
            self.torch.set_float32_matmul_precision(before)

    def error_of(self, precision: str, k: int = 64) -> float:
        """Largest relative error of a product at this setting, against float64."""
        rng = np.random.default_rng(0)
        A = self.torch.from_numpy(rng.uniform(0.5, 1.0, (k, k)).astype(np.float32))
        exact = A.double() @ A.double()
        with self.at(precision):
            return float(((A @ A).double() / exact - 1).abs().max())
