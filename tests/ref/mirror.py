"""H_ij = H_ji for j < i."""

import numpy as np


def mirror(H):
    return np.triu(H) + np.triu(H, 1).T
