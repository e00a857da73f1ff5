"""tr(E H E^T) in float64."""

import numpy as np


def quadratic(E, H):
    E = E.astype(np.float64)
    return float(np.sum((E @ H) * E))
