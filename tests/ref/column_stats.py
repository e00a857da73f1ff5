"""absolute + sum_t |x_tj| in float64; abs_max, minimum, maximum widened by the rows x_t."""

import numpy as np


def column_stats(X, absolute, abs_max, minimum, maximum):
    absolute = absolute.copy()
    for x in X.astype(np.float32):
        absolute += np.abs(x)
        abs_max = np.maximum(abs_max, np.abs(x))
        minimum, maximum = np.minimum(minimum, x), np.maximum(maximum, x)
    return absolute, abs_max, minimum, maximum
