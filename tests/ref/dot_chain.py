"""x after `rounds` times x += the sum of four products of a code and a byte, modulo 2^32."""

import numpy as np


def dot_chain(x, rounds, code, byte):
    return (x.astype(np.int64) + rounds * 4 * code * byte).astype(np.int32)
