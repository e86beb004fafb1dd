"""span(B) from the first r answers, whatever the engine: why hiding it would protect nothing for long.

A client adds B·A·x to its model, so it sees that vector, encrypted evaluation or not. Any r of them that are linearly
independent span the columns of B.
"""

import math

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


def span(outputs: F64, rank: int) -> F64:
    """An orthonormal basis (d_out, k), k ≤ ``rank``, of what answers (T, d_out) span: their leading directions."""
    _, sizes, rows = np.linalg.svd(outputs, full_matrices=False)
    kept = min(rank, int((sizes > 1e-12 * sizes[0]).sum()) if sizes.size and sizes[0] > 0 else 0)
    found: F64 = rows[:kept].T
    return found


def outside(basis: F64, columns: NDArray[np.float32]) -> float:
    """The share of ``columns`` (d_out, r), a B, that lies outside of span(basis): 0 all of B is known, 1 nothing.

    ‖(I − ΠΠᵀ)·B̃‖/‖B̃‖ for an orthonormal basis B̃ of B's columns, so that every direction counts alike; NaN for B = 0.
    """
    left, sizes, _ = np.linalg.svd(columns.astype(np.float64), full_matrices=False)
    if not sizes[0] > 0:
        return math.nan
    directions = left[:, sizes > 1e-6 * sizes[0]]
    rest = directions - basis @ (basis.T @ directions)
    return float(np.linalg.norm(rest) / np.linalg.norm(directions))
