"""code = clamp(rint(w / s) + z, 0, 2^b - 1), in float32, ties to even; of a table the nearest."""

import numpy as np

from ref import nearest, per_column


def encode(W, scales, zeros, group, bits, table=None):
    s, z = per_column(scales, W.shape[1], group), per_column(zeros, W.shape[1], group)
    return nearest(W / s, z, 2**bits - 1, table)[0].astype(np.uint8)
