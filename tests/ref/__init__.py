"""Plain NumPy twins of the C++ ops, one file each, formula on top.

NumPy and ml_dtypes only, so that a twin never leans on the code it judges. Where the order of
operations is part of an op's contract (one multiply-add chain along k, ascending) its twin has the
same chain, and results are equal bit for bit. `fused` is False for instruction sets without FMA.
"""

import ml_dtypes
import numpy as np


def fma(a, b, c, fused=True):
    """a b + c in float32, rounded once; not fused: rounded after each operation.

    Products of float32 are exact in float64. The sum there is rounded to odd, so that the second
    rounding, to float32, gives what one rounding of the exact sum would (Boldo, Melquiond 2008).
    """
    if not fused:
        return a * b + c
    product, c = np.float64(a) * b, np.float64(c)
    total = product + c
    back = total - product
    lost = (product - (total - back)) + (c - back)
    even = total.view(np.int64) & 1 == 0
    odd = np.nextafter(total, np.copysign(np.inf, lost))
    return np.where(even & (lost != 0), odd, total).astype(np.float32)


def nearest(x, z, top, table=None):
    """Code and level (value over scale) nearest to x: of the integers up to top around z, or of a
    table (levels, middles) the level with as many middles below x."""
    if table is None:
        code = np.clip(np.rint(x) + z, 0, top)
        return code, code - z
    code = np.searchsorted(np.float32(table[1]), x)
    return code, np.float32(table[0])[code]


def rounded(t, s, z, top, table=None, offset=False):
    """Code nearest to t and its value: (c - z) s, of a table level s, with offsets c s - z."""
    if offset:
        code = nearest((t + z) / s, np.float32(0), top)[0]
        return code, code * s - z
    code, level = nearest(t / s, z, top, table)
    return code, level * s


def per_column(values, k, group):
    """The scale or zero point of each column: (n, G) to (n, k)."""
    return np.asarray(values, np.float32)[:, np.arange(k) // group]


def units_of(levels, offset, g):
    """Step and largest multiple of group g's scales, and of its offsets; None where one level is.

    levels: None, or (steps (n, blocks), groups in a block, largest multiple)."""
    if levels is None:
        return None, None
    steps, block, codes = levels
    b, blocks = g // block, steps.shape[1] // (1 + offset)
    return (steps[:, b], codes), (steps[:, blocks + b], codes) if offset else None


def to_multiple(x, unit, least):
    return np.clip(np.rint(x / unit[0]), np.float32(least), np.float32(unit[1])) * unit[0]


def to_offset_grid(o, scale_grid, unit=None):
    """Offsets as stored: as scales, of either sign, or 0; or multiples from 0 on of their step."""
    if unit is not None:
        return to_multiple(o, unit, 0)
    size, smallest = np.abs(o), {"fp32": 2.0**-126}.get(scale_grid, 2.0**-14)
    kept = np.where(size < smallest / 2, np.float32(0), to_grid(size, scale_grid))
    return np.where(o < 0, -kept, kept)


def to_step_grid(s, scale_grid):
    """Steps as stored: positive numbers of fp16, subnormal ones too, or of bf16."""
    if scale_grid == "fp16":
        fine = np.clip(np.rint(s / np.float32(2.0**-24)), 1, None) * np.float32(2.0**-24)
        return np.where(s < 2.0**-14, fine, to_grid(s, "fp16")).astype(np.float32)
    return np.clip(s, 2.0**-126, 2.0**126).astype(ml_dtypes.bfloat16).astype(np.float32)


def to_grid(s, scale_grid, unit=None):
    """Scales as stored: bf16 or fp16 values that are normal in fp16, fp32, powers of two, e4m3; or
    multiples from 1 on of their step."""
    if unit is not None:
        return to_multiple(s, unit, 1)
    if scale_grid == "e8m0":  # ties to the power of two with the even exponent
        mantissa, exponent = np.frexp(np.asarray(s, np.float32))
        up = (mantissa > 0.75) | ((mantissa == 0.75) & (exponent % 2 != 0))
        return np.ldexp(np.float32(1), exponent - 1 + up)
    if scale_grid == "e4m3":
        stored = np.clip(s, 2.0**-6, 448.0).astype(ml_dtypes.float8_e4m3fn)
        return stored.astype(np.float32)
    dtype, smallest, largest = {
        "bf16": (ml_dtypes.bfloat16, 2.0**-14, 65280.0),
        "fp16": (np.float16, 2.0**-14, 65504.0),
        "fp32": (np.float32, 2.0**-126, 2.0**126),
    }[scale_grid]
    return np.clip(s, smallest, largest).astype(dtype).astype(np.float32)
