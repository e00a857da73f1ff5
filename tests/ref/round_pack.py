"""fit without a search, encode and pack, one after the other."""

import numpy as np

from ref.encode import encode
from ref.fit import fit
from ref.pack import pack


def round_pack(W, bits, group, symmetric, zero_min, scale_grid):
    W, one = W.astype(np.float32), np.ones(1, np.float32)
    scales, zeros = fit(W, None, bits, group, symmetric, zero_min, scale_grid, 2.0, one, False)
    return pack(encode(W, scales, zeros, group, bits), bits), scales, zeros
