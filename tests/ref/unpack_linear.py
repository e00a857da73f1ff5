"""The inverse of pack_linear: codes, scales and zero points of panels of 16 rows."""

import numpy as np


def lines(size):
    return -(-size // 64) * 64


def quads_of(units, width, strips):
    """[panel][bytes] to quads [panel][4 strips][64]."""
    units = units.reshape(len(units), -1, 64)
    if width == 3:
        three = units.reshape(len(units), -1, 3, 64)
        low = quads_of(three[:, :, :2].reshape(len(units), -1), 2, three.shape[1] * 2)
        high = (three[:, :, 2:] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
        return (low | high.reshape(low.shape) << 2)[:, : 4 * strips]
    shifts = width * np.arange(8 // width, dtype=np.uint8)[:, None]
    quads = (units[:, :, None] >> shifts) & np.uint8(2**width - 1)
    return quads.reshape(len(units), -1, 64)[:, : 4 * strips]


def unpack_linear(panels, n, k, group, width, words, kind, middle):
    G, sizes = -(-k // group), np.dtype(words).itemsize
    columns = [min(group, k - c) for c in range(0, k, group)]
    at, sides = 0, []
    for dtype, size in [(words, sizes), (words, sizes) if kind == "offsets" else (np.uint8, 1)]:
        cells = np.ascontiguousarray(panels[:, at : at + 16 * G * size]).view(dtype)
        sides.append(cells.reshape(-1, G, 16).transpose(0, 2, 1).reshape(-1, G)[:n])
        at += lines(16 * G * size)
        if kind == "middle":
            sides.append(np.full((n, G), middle, np.float32))
            break
    quads = quads_of(panels[:, at:], width, sum(-(-c // 16) for c in columns))
    rows = quads.reshape(len(panels), -1, 16, 4).transpose(0, 2, 1, 3).reshape(16 * len(panels), -1)
    starts = np.cumsum([0] + [-(-c // 16) * 16 for c in columns])
    codes = np.concatenate([rows[:n, s : s + c] for s, c in zip(starts, columns, strict=False)], 1)
    return codes, sides[0].astype(np.float32), sides[1].astype(np.float32)
