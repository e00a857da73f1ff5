"""Panels of 16 rows: scales, zero points, codes, each padded to 64 bytes (kernels/packed.h).

A group is padded to strips of 16 columns. Byte 4 lane + t of quad j of a strip is row `lane`,
column 4 j + t of it; a unit of 64 bytes holds 8 / width quads, the first in the low bits. Width 3:
two bits as for width 2, the third of two strips in one more unit.
"""

import numpy as np


def padded(x, multiple):
    return np.pad(x, (0, -len(x) % multiple))


def quads_of(codes, group):
    """(n, k) codes to quads [panel][4 strips][64 bytes], the groups padded one by one."""
    n, k = codes.shape
    parts = [codes[:, c : c + group] for c in range(0, k, group)]
    parts = [np.pad(p, ((0, -n % 16), (0, -p.shape[1] % 16))) for p in parts]
    wide = np.concatenate(parts, 1)
    return (
        wide.reshape(-1, 16, wide.shape[1] // 4, 4)
        .transpose(0, 2, 1, 3)
        .reshape(len(wide) // 16, -1, 64)
    )


def units_of(quads, width):
    """Quads in units of 64 bytes: [panel][bytes]."""
    if width == 3:
        quads = np.pad(quads, ((0, 0), (0, -quads.shape[1] % 8), (0, 0)))
        low = units_of(quads & 3, 2).reshape(len(quads), -1, 2, 64)
        high = (quads >> 2).reshape(len(quads), -1, 8, 64)
        high = np.sum(high << np.arange(8)[:, None], 2, dtype=np.uint8)
        return np.concatenate([low, high[:, :, None]], 2).reshape(len(quads), -1)
    each = 8 // width
    shifts = width * np.arange(each)[:, None]
    shared = quads.reshape(len(quads), -1, each, 64) << shifts
    return np.sum(shared, 2, dtype=np.uint8).reshape(len(quads), -1)


def pack_linear(codes, scales, zeros, group, width, words, kind):
    """words: dtype of scales and offsets; kind: "middle" | "bytes" | "offsets"."""
    n = len(codes)
    sides = [np.pad(scales.astype(words), ((0, -n % 16), (0, 0)))]
    if kind != "middle":
        stored = zeros.astype(words if kind == "offsets" else np.uint8)
        sides.append(np.pad(stored, ((0, -n % 16), (0, 0))))
    units, panels = units_of(quads_of(codes, group), width), []
    for p, unit in enumerate(units):
        rows = [np.ascontiguousarray(side[16 * p : 16 * p + 16].T) for side in sides]
        panels.append(np.concatenate([padded(r.view(np.uint8).ravel(), 64) for r in rows] + [unit]))
    return np.stack(panels)
