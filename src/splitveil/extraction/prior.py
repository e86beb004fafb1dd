"""Chosen queries under a prior: what an attacker believes of a core decides what it asks and what it makes of answers.

The core's rows are taken as normal with a covariance Σ: wider along rows that A had before training, if they are known.
A prior is no constraint: what answers say outweighs it, so that a wrong one costs rows, and after d rows little is left
of it. Asked are the principal components of what errors are judged by, and every row goes where it takes most off
the expected error: among many directions at first, to repetitions where there is much noise.
"""

import heapq
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from splitveil.errors import ConfigurationError
from splitveil.extraction.client import Client, residues
from splitveil.extraction.honest import ridge
from splitveil.private.bound import HALF
from splitveil.private.columns import MARGIN, Channel
from splitveil.private.core import core_rms

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
_LEAST = 1e-6  # of the squares outside, however well a guess explained the answers


def root_of_prior(basis: F64, outside: float) -> F64:
    """Σ^½ (d, d) in integer units: the share ``outside`` of the squares is beyond span(``basis``), (r, d).

    1 − r/d is what chance gives: then no direction is preferred, and more than that is not believed.
    """
    rank, width = basis.shape
    share = min(max(outside, _LEAST), 1 - rank / width)
    inner, outer = np.sqrt((1 - share) * width / rank), np.sqrt(share * width / (width - rank))
    found: F64 = core_rms(width) * (outer * np.eye(width) + (inner - outer) * basis.T @ basis)
    return found


def root_of_weight(width: int, inputs: F32 | None) -> F64:
    """W^½ (d, d) for an error e that counts as eᵀWe: half by what it does to activations (T, d), half as it is.

    As it is alone, where there are none.
    """
    if inputs is None:
        return np.eye(width)
    x = inputs.astype(np.float64)
    gram = x.T @ x
    sizes, vectors = np.linalg.eigh(np.eye(width) + gram * (width / np.trace(gram)))
    found: F64 = (vectors * np.sqrt(sizes)) @ vectors.T
    return found


@dataclass(frozen=True)
class Plan:
    """What is asked for under a prior, and how loudly."""

    prior: F64 = field(repr=False)
    asked: F64 = field(repr=False)
    """(d, d) directions of length 1, that of which the answer tells most first."""
    deviations: F64 = field(repr=False)
    """(d,) standard deviation of ⟨C_j, v⟩ along each, under the prior, in integer units."""
    spreads: F64 = field(repr=False)
    """(d,) what each takes off the expected error if it is known, as a root."""

    @classmethod
    def of(cls, prior: F64, weight: F64) -> "Plan":
        """``prior`` and ``weight`` (d, d), symmetric: the roots of the core's covariance and of what errors cost."""
        _, spreads, components = np.linalg.svd(prior @ weight)
        asked = components @ weight
        asked /= np.linalg.norm(asked, axis=1)[:, None]
        return cls(prior, asked, np.linalg.norm(asked @ prior, axis=1), spreads)

    def peak_ratio(self, core: F64) -> float:
        """The largest |⟨C_j, v⟩| of a core (rank, d), in units of what the prior expects of the direction v."""
        return float((np.abs(core @ self.asked.T) / self.deviations).max())


def informed(client: Client, layer: int, rows: int, plan: Plan, peak_ratio: float) -> F64:
    """The core (rank, d) in integer units, from ``rows`` rows.

    ``peak_ratio`` is the attacker's guess at ``plan.peak_ratio``, right to a quarter. Raises ``ConfigurationError``
    where noise leaves no room for a query.
    """
    sigma = client.sigma(layer)
    sizes = (HALF - MARGIN * sigma) / (Channel.rounded_peak(peak_ratio) * plan.deviations)
    if sizes.min() < 1:
        raise ConfigurationError("the answer noise is as wide as the modulus: a query along a direction tells nothing")
    counts = _shared_out(plan.spreads**2, (plan.spreads * sigma / sizes / plan.deviations) ** 2, rows)
    queries = np.rint(np.repeat(plan.asked * sizes[:, None], counts, axis=0)).astype(np.int64)
    prior = plan.prior
    answers = client.ask(layer, residues(queries)).astype(np.float64)
    found: F64 = (prior @ ridge(queries @ prior / sigma, answers / sigma)).T
    return found


def _shared_out(variances: F64, noises: F64, rows: int) -> NDArray[np.intp]:
    """How often to ask for each coordinate of such a variance, by answers of such a noise (a variance).

    n answers leave v/(1 + n·v/s²) of v, a convex function of n: the best next row is that of the best plan.
    """
    counts = np.zeros(len(variances), dtype=np.intp)

    def gain(index: int) -> float:
        ratio = variances[index] / noises[index]
        return float(variances[index] * ratio / (1 + counts[index] * ratio) / (1 + (counts[index] + 1) * ratio))

    waiting = [(-gain(index), index) for index in range(len(variances))]
    heapq.heapify(waiting)
    for _ in range(rows):
        index = waiting[0][1]
        counts[index] += 1
        heapq.heapreplace(waiting, (-gain(index), index))
    return counts
