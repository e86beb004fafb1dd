"""Queries along known directions. Where they are those of A, r rows are enough.

Whoever knows A as it was trained (it was frozen, published, or belongs to a family of adapters that share it) knows
where all rows of the core C = M·A lie; r answers give M. Who knows only what A was before training: ``guessed``.
"""

import numpy as np
from numpy.typing import NDArray

from splitveil.errors import ConfigurationError
from splitveil.extraction.chosen import Estimate
from splitveil.extraction.client import Client
from splitveil.extraction.directed import ask_in_turn
from splitveil.private.bound import HALF
from splitveil.private.columns import MARGIN

F64 = NDArray[np.float64]


def row_space(guess: NDArray[np.float32]) -> F64:
    """An orthonormal basis (r, d) of the rows of a known or guessed A (r, d)."""
    _, sizes, rows = np.linalg.svd(guess.astype(np.float64), full_matrices=False)
    found: F64 = rows[sizes > 1e-6 * sizes[0]]
    return found


def known_rows(client: Client, layer: int, rows: int, basis: F64) -> Estimate:
    """The core from ``rows`` rows of queries along ``basis`` (r, d), in turn; with more than r, noise averages out.

    No query wraps, whatever the core: |⟨C_j, x̂⟩| ≤ ρ‖x̂‖₂. Raises ``ConfigurationError`` where noise leaves no room.
    """
    published = client.layer(layer)
    size = (HALF - MARGIN * client.sigma(layer)) / (published.norm_bound + 1)
    if size < 1:
        raise ConfigurationError("the answer noise is as wide as the modulus: a query along a direction tells nothing")
    found = ask_in_turn(client, layer, rows, basis, size)
    return Estimate(found, np.full(published.width, rows >= len(basis)), client.rows[layer])
