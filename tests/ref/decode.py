"""w = (code - z) s, in float32; of a table level[code] s; with offsets code s - z."""

import numpy as np

from ref import per_column


def decode(codes, scales, zeros, group, table=None, offset=False):
    s, z = per_column(scales, codes.shape[1], group), per_column(zeros, codes.shape[1], group)
    if offset:
        return codes.astype(np.float32) * s - z
    level = codes.astype(np.float32) - z if table is None else np.float32(table[0])[codes]
    return level * s
