"""Sum of the words of each row, modulo 2^64."""

import numpy as np


def word_sum(x):
    return np.array([sum(map(int, row)) % 2**64 for row in x], np.uint64)
