"""code = clamp(rint(w / s) + z, 0, 2^b - 1), in float32, ties to even; of a table the nearest.

With offsets code = clamp(rint((w + z) / s), 0, 2^b - 1).
"""

import numpy as np

from ref import nearest, per_column


def encode(W, scales, zeros, group, bits, table=None, offset=False):
    s, z = per_column(scales, W.shape[1], group), per_column(zeros, W.shape[1], group)
    if offset:
        return nearest((W + z) / s, np.float32(0), 2**bits - 1)[0].astype(np.uint8)
    return nearest(W / s, z, 2**bits - 1, table)[0].astype(np.uint8)
