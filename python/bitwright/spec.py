"""The nouns of bitwright; those of a block (Linear, Group, Heads, Arch) are in structure.py.

Symbols, the same in every file: `W` is a weight matrix (n, k) = (out, in), row-major, as a
checkpoint stores it; `g` columns of a row share a scale `s` and a zero point `z`; a code c means

    w = (grid[c] - z) * s        in float32: one subtraction, one multiplication.

`X` is (tokens, k), `H = X^T X / tokens`, `E = W - Q`. The layer objective is tr(E H E^T), the mean
squared output error summed over the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bitwright.errors import BitwrightError as BitwrightError
from bitwright.errors import DeviceError as DeviceError
from bitwright.errors import DiskError as DiskError
from bitwright.errors import InputError as InputError
from bitwright.errors import NumericalError as NumericalError
from bitwright.errors import RefusedError as RefusedError
from bitwright.errors import VerificationError as VerificationError
from bitwright.structure import Arch as Arch
from bitwright.structure import Group as Group
from bitwright.structure import Heads as Heads
from bitwright.structure import Linear as Linear

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]

ScaleGrid = Literal["bf16", "fp16", "fp32", "e8m0", "e4m3"]
SCALE_BITS: Mapping[ScaleGrid, int] = {"bf16": 16, "fp16": 16, "fp32": 32, "e8m0": 8, "e4m3": 8}


@dataclass(frozen=True)
class Grid:
    """A number format as data.

    name: as in scheme names ("int4"). bits: storage bits of a code. values: value of each code,
    ascending, at most 256. Uniform grids have values[c] == c, so that C++ takes the arithmetic
    path. Others are tables, without zero points; a value half-way between two levels takes the one
    that lies an even number of levels from 0, as floats do.
    """

    name: str
    bits: int
    values: tuple[float, ...]

    @cached_property
    def uniform(self) -> bool:
        return self.values == tuple(float(c) for c in range(len(self.values)))

    @cached_property
    def middles(self) -> tuple[float, ...]:
        """Of a table: a value above middles[i] takes level i + 1 or a higher one."""
        if self.uniform:
            return ()
        levels = np.asarray(self.values, np.float32)
        middles = (levels[:-1] + levels[1:]) / np.float32(2)
        up = (np.arange(1, len(levels)) - self.values.index(0.0)) % 2 == 0
        middles[up] = np.nextafter(middles[up], np.float32(-np.inf))
        return tuple(map(float, middles))


@dataclass(frozen=True)
class Scheme:
    """How one matrix is stored: a grid, who shares a scale, and the grid the scales live on.

    group: columns that share a scale; 0 = the whole row (channel), -1 = the whole matrix (tensor).
    A last short group is part of the definition: G = ceil(k / group). symmetric: the zero point is
    2^(bits-1) (of tables 0) and not stored. offset, of asymmetric schemes: not a zero point in
    codes but a number in the units of the weights is stored, w = code * scale - offset (a float
    zero point, the "min" of K-quants). scale: grid of the scales. "bf16" = bf16 values inside
    fp16's normal range, hence exact in fp16, bf16 and fp32 files; "fp16", "fp32", "e8m0" (powers of
    two) and "e4m3" (over one float32 for the whole matrix) bind the result to formats that hold
    them. zero_min: smallest zero point allowed (1 makes zero points portable to formats
    that store z - 1). block, scale_bits: scales of two levels. So many groups of a row share a
    step, a number on `scale`'s grid, and each scale is a whole multiple of it, of scale_bits bits
    (symmetric: one of them is the sign); offsets likewise, of a step of their own. block 0: one
    level.
    """

    grid: Grid
    group: int
    symmetric: bool = True
    scale: ScaleGrid = "bf16"
    zero_min: int = 0
    offset: bool = False
    block: int = 0
    scale_bits: int = 0

    def __post_init__(self) -> None:
        for broken, wanted in (
            (not self.symmetric and not self.grid.uniform, "no zero points with a table"),
            (self.scale == "e4m3" and self.group == -1, "groups or channels for e4m3 scales"),
            (self.offset and self.symmetric, "offsets in asymmetric schemes only"),
            (self.offset and SCALE_BITS[self.scale] < 16, "bf16, fp16 or fp32 scales with offsets"),
            (self.block > 0 and self.group <= 0, "groups for two-level scales"),
            (self.block > 0 and self.scale not in ("bf16", "fp16"), "steps of bf16 or fp16"),
            (bool(self.block) != (2 <= self.scale_bits <= 8), "a block and 2 to 8 bits for scales"),
        ):
            if broken:
                raise RefusedError(f"[scheme] wanted {wanted}, got {self.name}")

    @property
    def bits(self) -> int:
        return self.grid.bits

    @property
    def plain(self) -> bool:
        """Integers around a zero point, with scales of one level: what most engines mean."""
        return self.grid.uniform and not self.offset and not self.block

    @property
    def of_whole(self) -> bool:
        """Whether a scale depends on all rows of the matrix."""
        return self.group == -1 or self.scale == "e4m3"

    @property
    def name(self) -> str:
        where = {0: "channel", -1: "tensor"}.get(self.group, f"g{self.group}")
        scale = "" if self.scale == "bf16" else f"-{self.scale}"
        levels = f"-{self.block}x{self.scale_bits}" if self.block else ""
        zero = "" if self.symmetric else "-offset" if self.offset else "-asym"
        return f"{self.grid.name}-{where}{zero}{scale}{levels}"

    def columns(self, k: int) -> int:
        """Columns per group in a row of k: the whole row for channel and tensor schemes."""
        return k if self.group <= 0 else min(self.group, k)

    def groups(self, k: int) -> int:
        """Groups in a row of k columns."""
        return -(-k // self.columns(k))

    def blocks(self, k: int) -> int:
        """Steps in a row of k columns: those of the scales, behind them those of the offsets."""
        return -(-self.groups(k) // self.block) * (1 + self.offset) if self.block else 0

    def bits_per_weight(self, n: int, k: int) -> float:
        """Stored bits per weight of an (n, k) matrix: codes, scales, zeros."""
        cells = 1 if self.group == -1 else n * self.groups(k)
        one = self.scale_bits if self.block else SCALE_BITS[self.scale]
        side = one + (0 if self.symmetric else one if self.offset else self.bits)
        whole = 32 if self.scale == "e4m3" else n * self.blocks(k) * SCALE_BITS[self.scale]
        return self.bits + (cells * side + whole) / (n * k)


@dataclass(frozen=True, eq=False)
class QTensor:
    """Codes, scales and zero points of one (n, k) matrix.

    codes: uint8 (n, k). scales: float32 (n, G). zeros: uint8 (n, G), constant where symmetric; or,
    of schemes with offsets, those, float32. Tensor schemes have G = 1 and equal rows. global_scale:
    "e4m3" scales are stored values divided by it. steps: of two-level schemes, float32 (n, blocks),
    of which scales and offsets are whole multiples. order: column order[j] of the matrix is column
    j of the codes, int32 (k,) (act-order, as others write it); None: as they stand.
    """

    codes: U8
    scales: F32
    zeros: U8 | F32
    scheme: Scheme
    global_scale: float = 1.0
    steps: F32 | None = None
    order: I32 | None = None

    def __post_init__(self) -> None:
        if self.codes.ndim != 2 or not self.codes.size:
            got = f"{self.codes.shape} for {self.scheme.name}"
            raise InputError(f"[QTensor] wanted codes (n, k), got {got}")
        check_beside(self)

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.codes.shape
        return n, k

    def dequantize(self) -> F32:
        """The value, float32 (n, k): the definition that every format must reproduce."""
        k = self.codes.shape[1]
        g = self.scheme.columns(k)
        column_group = np.arange(k) // g
        levels = np.asarray(self.scheme.grid.values, np.float32)[self.codes]
        scales, zeros = self.scales[:, column_group], self.zeros[:, column_group]
        W = levels * scales - zeros if self.scheme.offset else (levels - np.float32(zeros)) * scales
        return np.asarray(W if self.order is None else W[:, np.argsort(self.order)], np.float32)


def check_beside(q: Any) -> None:
    """InputError unless scales, zeros, steps and order of a QTensor (or alike) fit its shape and
    scheme."""
    (n, k), scheme, steps = q.shape, q.scheme, q.steps
    want = (n, scheme.groups(k))
    if q.scales.shape != want or q.zeros.shape != want:
        raise InputError(
            f"[QTensor] scales and zeros must be {want} for codes {(n, k)} in {scheme.name}, got "
            f"{q.scales.shape} and {q.zeros.shape}"
        )
    if q.order is not None and not np.array_equal(np.sort(q.order), np.arange(k)):
        raise InputError(f"[QTensor] order must have each of {k} columns once, got others")
    wide, got = scheme.blocks(k), (n, 0) if steps is None else steps.shape
    if got != (n, wide):
        raise InputError(f"[QTensor] steps must be {(n, wide)} in {scheme.name}, got {got}")
    if steps is None:
        return
    for values, first in ((q.scales, 0), (q.zeros, wide // 2))[: 1 + scheme.offset]:
        units = np.repeat(steps[:, first:], scheme.block, 1)[:, : values.shape[1]]
        if not np.array_equal(np.rint(values / units) * units, values):
            raise InputError(
                "[QTensor] wanted scales and offsets that are multiples of their steps in "
                f"{scheme.name}, got others"
            )


@dataclass(frozen=True, eq=False)
class Held:
    """The part of the compared tokens on which the drift's share is chosen: their H and C, as in
    `Stats`, and their share of all compared tokens."""

    H: F64
    C: F64
    share: float


@dataclass(frozen=True, eq=False)
class Stats:
    """What calibration learned about the input of a group of linears. k = input columns.

    H: float64 (k, k) = X^T X / tokens, or None where only the column statistics were asked for; or
    (B, k, k), one for each of B equal blocks of rows (v: one per KV head, of the inputs that its
    attention mixes). C, of H's shape: (X_float - X)^T X / tokens, how the inputs drifted from those
    of the float model; None where that was not asked for. D, float64 (n, k): (S_float - S)^T X /
    tokens over the same tokens, S the residual stream that the outputs are added to. held: of a
    part of the tokens that C counts. tokens: rows of X (for each block). mean_abs, abs_max,
    minimum, maximum: float32 (k,).
    """

    tokens: int
    H: F64 | None
    mean_abs: F32
    abs_max: F32
    minimum: F32
    maximum: F32
    C: F64 | None = None
    held: Held | None = None
    D: F64 | None = None

    def release(self) -> None:
        """Forgets C, D and what is held out, once no matrix asks for them: as much again as H."""
        for name in ("C", "held", "D"):
            object.__setattr__(self, name, None)


@dataclass(frozen=True, eq=False)
class Rescale:
    """Column scales of a group: weights become W diag(scales), the norm in front absorbs the
    inverse.

    scales: float32 (k,), positive. exponent: what they were raised to, for the report."""

    scales: F32
    exponent: float


@dataclass(frozen=True)
class Target:
    """One matrix of a checkpoint and what is to become of it; scheme None keeps it in float.

    name: module path without ".weight". shape: (n, k) = (out, in), also where it is stored
    transposed.
    """

    name: str
    linear: Linear
    shape: tuple[int, int]
    scheme: Scheme | None


@dataclass(frozen=True)
class Report:
    """What really happened to one linear.

    method: what was applied; fallback: why it is not what was asked for ("" if it is).
    damping: relative to the mean of H's diagonal; rung: steps climbed on the damping ladder.
    error_rtn, error: tr(E H E^T) / tr(W H W^T) of plain rounding and of the result (without
    calibration: H = I), E relative to the target that was solved for; error_swept: of GPTQ's
    result before refinement, None where there was no such moment. alpha: share of the drift in that
    target, None where inputs were not compared; residual: of the residual stream's error, None
    where the outputs are not added to it. heads: so many blocks of rows had an H of attention-mixed
    inputs (tokens counts their rows), 0: one H of the inputs themselves. coupled: rows of a head
    were solved under what attention multiplies them with. awq: exponent of the column scales, None
    where they were not searched.
    """

    name: str
    shape: tuple[int, int]
    scheme: str
    method: str
    bits_per_weight: float
    error_rtn: float
    error: float
    tokens: int = 0
    damping: float = 0.0
    rung: int = 0
    dead: int = 0
    fallback: str = ""
    awq: float | None = None
    error_swept: float | None = None
    alpha: float | None = None
    residual: float | None = None
    heads: int = 0
    coupled: bool = False
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Override:
    """For linears whose full name matches `pattern` (a shell pattern, or "re:" and a regular
    expression that must match the whole name): another scheme; or other bits or another group
    (columns, "channel" or "tensor") in the recipe's scheme; or skip."""

    pattern: str
    scheme: str | None = None
    bits: int | None = None
    group: int | str | None = None
    skip: bool = False


@dataclass(frozen=True)
class Recipe:
    """The whole wish. Text fields are checked against the registries by `recipe.check`.

    scheme: "int4-g64", ...; method: "rtn" | "gptq" | "awq" | "awq+gptq"; overrides: first match
    wins; effort: "fast" | "default" | "max", named options of the solver; options: its keywords one
    by one (damping, ...), before those of the effort; samples, length: calibration windows and
    tokens in each; seed: order of samples drawn from a list or a data set.
    """

    scheme: str = "int4-g64"
    method: str = "gptq"
    format: str = "compressed-tensors"
    effort: str = "default"
    overrides: tuple[Override, ...] = ()
    options: Mapping[str, float | int | str | bool] = field(default_factory=dict)
    samples: int = 128
    length: int = 512
    seed: int = 0
    chat: bool = False
