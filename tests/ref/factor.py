"""R upper triangular with R R^T = H[order][:, order] + damping I =: A.

With P the reversal of rows and columns: P A P = L L^T, R = P L P. Dead columns of A: the damping
(1 without) on the diagonal, 0 elsewhere. None where A is not positive definite.
"""

import numpy as np


def factor(H, order, dead, damping):
    A = H[np.ix_(order, order)] + damping * np.eye(len(H))
    gone = dead[order]
    A[gone, :] = A[:, gone] = 0
    A[gone, gone] = damping if damping > 0 else 1
    try:
        return np.linalg.cholesky(A[::-1, ::-1])[::-1, ::-1].astype(np.float32)
    except np.linalg.LinAlgError:
        return None
