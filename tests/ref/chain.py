"""x after `rounds` times x = x a + b, one multiply-add each; of bf16 pairs x = x + 2 a b.

The twins of float64 and of pairs hold where every result is exact."""

import ml_dtypes
import numpy as np

from ref import fma


def chain(x, rounds, a, b, pairs=False, fused=True):
    for _ in range(rounds):
        if pairs:
            product = np.float32(ml_dtypes.bfloat16(a)) * np.float32(ml_dtypes.bfloat16(b))
            x = x + 2 * product
        elif x.dtype == np.float64:
            x = x * a + b
        else:
            x = fma(x, np.float32(a), np.float32(b), fused)
    return x
