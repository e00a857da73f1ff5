"""The forward and the sums over tokens on a GPU, where torch has one; the solve stays in the core.

On the GPU lie one block's weights, what is parked in it, and a group's sums; hidden states between
blocks stay in host memory. No code of ours runs there: torch's products do.

Sums are those of the core in all but the order of additions: float32 products of 512 tokens at a
time, added up in float64. Float32 inputs are never cut to TF32. bf16 inputs may be multiplied as
TF32 (`products` "bfloat16", the default for them): it holds every bf16 number, so products stay
exact; differences of two inputs (`cross`) are no bf16 numbers and are multiplied as float32.

The same command on the same card gives the same bytes. Another card, or the CPU, adds in another
order: the device is part of what a resumed run must share with the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bitwright.calib import precision
from bitwright.calib.sums import Columns
from bitwright.spec import F64, DeviceError, InputError

CHUNK = 512  # tokens of one float32 product
Device = torch.device
CPU = Device("cpu")


def choose(wish: str | None = None) -> torch.device:
    """The device of a wish: "cpu", "cuda" or "cuda:1" (ROCm's cards are called so too); None: a GPU
    where torch has one. InputError for another, or one that is not there."""
    if wish is None:
        wish = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wish)
    except RuntimeError:
        device = torch.device("meta")
    count = torch.cuda.device_count()
    if device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < count):
        return device
    raise InputError(
        f"[device] wanted cpu or one of the {count} CUDA devices that this torch "
        f"({torch.__version__}) has, got {wish!r}"
    )


def label(device: torch.device) -> str:
    """ "cpu", or the card's name."""
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a card has bf16 products of its own."""
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def settle(device: torch.device) -> None:
    """Waits until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def guarded() -> Iterator[None]:
    """Running out of a card's memory becomes one sentence."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        line = str(error).strip().partition("\n")[0].partition(". GPU")[0]
        raise DeviceError(
            f"[device] wanted more memory than the GPU has left ({line}); shorter windows, a "
            "GPU that nobody else uses, or --device cpu take less"
        ) from error


def free_bytes(device: torch.device) -> int:
    """Memory of a card that can be taken now, what torch keeps for later included."""
    if device.type == "cpu":
        return 0
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free: int = torch.cuda.mem_get_info(device)[0] + kept
    return free


def peak_bytes(device: torch.device, forget: bool = False) -> int:
    """The most that tensors have held on a card at a time, 0 on the CPU; forget: counted anew."""
    if device.type == "cpu":
        return 0
    most: int = torch.cuda.max_memory_allocated(device)
    if forget:
        torch.cuda.reset_peak_memory_stats(device)
    return most


class DeviceSums:
    """`calib.sums.Sums` in torch. bfloat16: bf16 inputs are multiplied as such (see above)."""

    def __init__(self, k: int, device: torch.device, bfloat16: bool = False) -> None:
        self.device, self.bfloat16 = device, bfloat16
        self._absolute = torch.zeros(k, dtype=torch.float64, device=device)
        self._abs_max = torch.zeros(k, device=device)
        self._minimum = torch.full((k,), torch.inf, device=device)
        self._maximum = torch.full((k,), -torch.inf, device=device)

    def take(self, x: Any) -> torch.Tensor:
        there: torch.Tensor = torch.as_tensor(x, device=self.device)
        if there.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise InputError(
                f"[stats] wanted float32, float16 or bfloat16 inputs, got {there.dtype}"
            )
        return there

    def shaped(self, x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        flat: torch.Tensor = x.reshape(shape)
        return flat

    def zeros(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    def gram(self, X: torch.Tensor, H: torch.Tensor) -> None:
        pairs = self.bfloat16 and X.dtype == torch.bfloat16
        with precision.setting("high" if pairs else "highest"):
            for begin in range(0, len(X), CHUNK):
                wide = X[begin : begin + CHUNK].float()
                H += wide.T @ wide

    def cross(
        self,
        before: torch.Tensor,
        X: torch.Tensor,
        C: torch.Tensor,
        after: torch.Tensor | None = None,
    ) -> None:
        after = X if after is None else after
        with precision.setting("highest"):
            for begin in range(0, len(X), CHUNK):
                b, a, x = (t[begin : begin + CHUNK].float() for t in (before, after, X))
                C += (b - a).T @ x

    def columns(self, X: torch.Tensor) -> None:
        size = X.abs()
        self._absolute += size.sum(0, dtype=torch.float64)
        if len(X):
            low, high = torch.aminmax(X, dim=0)
            self._abs_max = torch.maximum(self._abs_max, size.amax(0).float())
            self._minimum = torch.minimum(self._minimum, low.float())
            self._maximum = torch.maximum(self._maximum, high.float())

    def column_sums(self) -> Columns:
        absolute, *extremes = (
            t.cpu().numpy() for t in (self._absolute, self._abs_max, self._minimum, self._maximum)
        )
        return absolute, extremes[0], extremes[1], extremes[2]

    def host(self, matrix: torch.Tensor) -> F64:
        found: F64 = matrix.cpu().numpy()
        return found
