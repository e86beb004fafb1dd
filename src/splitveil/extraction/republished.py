"""Several publications of the same weights: what ρ gives away when it is published in many gauges.

A server with a gauge key publishes the same weights in one gauge (``private.core.gauged``), and this finds nothing.

ρ is the longest row of the core in the gauge of that publication, which Q shows: (ρ·step)² = max_j q_jᵀ·G·q_j for the
columns q_j of Q and G = ΔW·ΔWᵀ. Every publication draws a new gauge and adds one such equation about the r(r+1)/2
unknown entries of G within span(B); its trace is known from ``step``. From about twice as many publications on G is
determined: the singular values of ΔW and its left singular directions. The right ones, of d entries each, are not in
it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from splitveil.private.core import core_rms
from splitveil.private.published import Publication

F64 = NDArray[np.float64]
_STARTS = 12
_ROUNDS = 400
_TRACE = 10.0  # weight of the equation for the trace, which every publication repeats


@dataclass(frozen=True)
class Gram:
    """ΔW·ΔWᵀ as it follows from publications."""

    frame: F64 = field(repr=False)
    """(d_out, r): the basis of span(B) that ``values`` is written in."""
    values: F64 = field(repr=False)
    """(r, r)."""
    misfit: float
    """Mean |max_j q_jᵀGq_j − (ρ·step)²| ÷ mean (ρ·step)²: about 1e-5, by ρ's rounding, where G was found."""


def gram(publications: Sequence[Publication], layer: int, seed: int = 0) -> Gram:
    """G of one layer from publications of the same weights; ``misfit`` says whether there were enough of them.

    Raises ``ValueError`` for a layer without Q: its frame does not change, so that nothing is added.
    """
    layers = [publication.layers[layer] for publication in publications]
    frames = [one.Q.astype(np.float64) for one in layers if one.Q is not None]
    if len(frames) != len(layers) or not layers:
        raise ValueError("publications of a layer with Q are needed")
    frame, rank = frames[0], layers[0].rank
    upper = np.triu_indices(rank)
    diagonal = upper[0] == upper[1]
    turned = np.array([(frame.T @ one).T for one in frames])
    # (publications, r, unknowns): q_jᵀ·G·q_j is linear in the upper triangle of G.
    products = turned[:, :, upper[0]] * turned[:, :, upper[1]] * np.where(diagonal, 1.0, 2.0)
    longest = np.array([(one.norm_bound * one.step) ** 2 for one in layers])
    trace = float(np.mean([rank * one.width * (one.step * core_rms(one.width)) ** 2 for one in layers]))
    known = np.r_[longest, trace * _TRACE]
    random = np.random.default_rng(seed)
    best, misfit = np.diag(np.full(rank, trace / rank))[upper], np.inf
    for start in range(_STARTS):
        noise = random.standard_normal((rank, rank))
        guess = (np.eye(rank) + min(start, 1) * 0.15 * (noise + noise.T))[upper] * trace / rank
        row: NDArray[np.intp] | None = None
        for _ in range(_ROUNDS):
            # Which row was the longest is guessed from G, and G from that, until neither changes.
            last, row = row, (products @ guess).argmax(axis=1)
            if last is not None and (last == row).all():
                break
            equations = np.vstack([products[np.arange(len(layers)), row], diagonal * _TRACE])
            guess = np.linalg.lstsq(equations, known, rcond=None)[0]
        found = float(np.abs((products @ guess).max(axis=1) - longest).mean() / longest.mean())
        if found < misfit:
            best, misfit = guess, found
        if misfit < 1e-4:
            break
    values = np.zeros((rank, rank))
    values[upper] = best
    return Gram(frame, values + np.triu(values, 1).T, misfit)
