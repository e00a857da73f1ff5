"""Per row and group the range times the factor with the least e_g H_gg e_g^T, first of the best."""

import numpy as np

from ref.decode import decode
from ref.encode import encode
from ref.fit import fit_group


def awq_clip(W, H, bits, group, symmetric, zero_min, scale_grid, factors):
    scales, zeros = [], []
    for first in range(0, W.shape[1], group):
        w, h = W[:, first : first + group], H[first : first + group, first : first + group]
        tried = []
        for f in factors:
            s, z = fit_group(
                w, np.float32(1), bits, symmetric, zero_min, scale_grid, 2.0, [f], False
            )
            grid = s[:, None], z[:, None]
            e = (w - decode(encode(w, *grid, group, bits), *grid, group)).astype(np.float64)
            tried.append((np.sum((e @ h) * e, 1), s, z))
        losses, s, z = (np.array(column) for column in zip(*tried, strict=True))
        best = np.argmin(losses, 0), np.arange(len(W))
        scales.append(s[best])
        zeros.append(z[best])
    return np.stack(scales, 1), np.stack(zeros, 1)
