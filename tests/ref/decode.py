"""w = (code - z) s, in float32."""

import numpy as np

from ref import per_column


def decode(codes, scales, zeros, group):
    s, z = per_column(scales, codes.shape[1], group), per_column(zeros, codes.shape[1], group)
    return (codes.astype(np.float32) - z) * s
