"""Chosen queries along the directions in which the base model's activations vary most, the largest first.

The base model is public, so an attacker knows these directions beforehand. For fewer rows than columns they are the
best that is known without a guess at A: training moves a layer along the activations that it sees, so that directions
hold more of the core than as many columns do, and most of what an adapter does to real text.
"""

import numpy as np
from numpy.typing import NDArray

from splitveil.errors import ConfigurationError
from splitveil.extraction.client import Client, residues
from splitveil.private.columns import Channel, direct_multiplier
from splitveil.private.core import core_rms
from splitveil.private.directions import directions_worth_asking

F64 = NDArray[np.float64]


def main_directions(inputs: NDArray[np.float32]) -> F64:
    """Orthonormal directions (d, d), those along which activations (T, d) are largest first."""
    x = inputs.astype(np.float64)
    _, vectors = np.linalg.eigh(x.T @ x)
    found: F64 = vectors.T[::-1]
    return found


def initial_first(initial: F64, main: F64) -> F64:
    """The row space of A before training (r, d), and then the main directions (d, d), as far as they lie outside."""
    found: F64 = np.linalg.qr(np.vstack([initial, main]).T)[0].T
    return found


def ask_along(client: Client, layer: int, rows: int, basis: F64, peak_ratio: float) -> F64:
    """The core (rank, d), in integer units, from ``rows`` rows of queries along the first of ``basis`` (k, d).

    One a row; in much noise along fewer, in turn, as ``private.directions`` has it.

    ``peak_ratio`` is the attacker's guess at the largest |⟨C_j, v⟩| in units of c(d), for every direction v of the
    basis: right to a quarter, as that at the largest entry is taken to be (``chosen``). Raises ``ConfigurationError``
    where noise leaves no room for a query.
    """
    width, sigma = client.layer(layer).width, client.sigma(layer)
    size = direct_multiplier(sigma, Channel.rounded_peak(peak_ratio) * core_rms(width))
    if not size:
        raise ConfigurationError("the answer noise is as wide as the modulus: a query along a direction tells nothing")
    noise = sigma / size / core_rms(width)
    basis = basis[: directions_worth_asking(width, noise, rows)]
    return ask_in_turn(client, layer, rows, basis, size)


def ask_in_turn(client: Client, layer: int, rows: int, basis: F64, size: float) -> F64:
    """What the core (rank, d) holds along ``basis`` (k, d), by ``rows`` queries of that ``size``, one direction after
    the other; with more rows than directions, again from the first, and noise averages out.
    """
    queries = np.rint(basis[np.arange(rows) % len(basis)] * size).astype(np.int64)
    answers = client.ask(layer, residues(queries)).astype(np.float64)
    # answers = (x̂·basisᵀ)·Mᵀ + g, with all of x̂ known.
    mixed, *_ = np.linalg.lstsq(queries.astype(np.float64) @ basis.T, answers, rcond=None)
    found: F64 = mixed.T @ basis
    return found
