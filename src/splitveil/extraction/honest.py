"""Honest but curious: a client that runs the protocol as it is meant, on real text, and keeps its answers.

Every answer is one linear equation about the core with known noise; under the prior that a core's entries are normal,
as they nearly are, the best linear estimate is ridge regression with the noise as weights. It needs no query out of the
ordinary, so nothing can tell this client from any other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from splitveil.extraction.client import Answer
from splitveil.lattice.parameters import QUERY_SIGMA
from splitveil.private.bound import HALF, budget
from splitveil.private.core import core_rms
from splitveil.private.layer import public_half
from splitveil.private.published import Publication

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
_BATCH = 512


@dataclass(frozen=True)
class Transcript:
    """What a client has seen at one layer: inputs (T, d) and what came back for them, C·x (T, rank), with noise."""

    inputs: F32 = field(repr=False)
    outputs: F64 = field(repr=False)
    deviations: F64 = field(repr=False)
    """(T,) standard deviation of the noise in each output, as everybody can compute it; 0 where x was 0."""


def converse(publication: Publication, answer: Answer, layers: Sequence[int], inputs: F32) -> list[Transcript]:
    """Asks one site, with the client's own code, about rows (T, d) of activations: one transcript a layer."""
    site = public_half(publication).site(layers)
    outputs: list[list[F32]] = [[] for _ in layers]
    for first in range(0, len(inputs), _BATCH):
        part = np.ascontiguousarray(inputs[first : first + _BATCH], dtype=np.float32)
        query, pending = site.query(part, site.make_masks(len(part)))
        for kept, new in zip(outputs, site.recover(pending, answer(layers, len(part), query)), strict=True):
            kept.append(new)
    deviations = noise_deviations(publication, layers, inputs)
    return [
        Transcript(inputs, np.concatenate(kept).astype(np.float64), deviation)
        for kept, deviation in zip(outputs, deviations, strict=True)
    ]


def noise_deviations(publication: Publication, layers: Sequence[int], inputs: F32) -> list[F64]:
    """(T,) for each layer: the standard deviation of what is added to C·x, by the protocol's own distributions."""
    parameters = publication.parameters
    width = publication.layers[layers[0]].width
    norms = np.linalg.norm(inputs.astype(np.float64), axis=1)
    budgets = [
        budget(parameters, width, publication.layers[i].norm_bound, publication.noise).theta
        / publication.layers[i].norm_bound
        for i in layers
    ]
    size = min(budgets) * HALF
    found = []
    for index in layers:
        layer = publication.layers[index]
        sigma = budget(parameters, width, layer.norm_bound, publication.noise).answer_sigma
        # The core's rows are at most ρ long: e, and the rounding of x̂ (1/12), reach the answer through them.
        square = layer.norm_bound**2 * (QUERY_SIGMA**2 + 1 / 12) + sigma**2
        square += parameters.pad_width * (parameters.pad_sigma * QUERY_SIGMA) ** 2
        square += 2 / 3 * parameters.ring_degree * parameters.hint_sigma**2
        found.append(math.sqrt(square) * layer.step / size * norms)
    return found


def regress(transcript: Transcript, step: float, basis: F64 | None = None) -> F64:
    """The core, (rank, d) in units of its integers, that a transcript makes most likely.

    ``basis`` (k, d), orthonormal: where the core's rows are known to lie; without it every direction is as likely.
    """
    x = transcript.inputs.astype(np.float64)
    kept = transcript.deviations > 0
    x, y, deviation = x[kept], transcript.outputs[kept], transcript.deviations[kept]
    spread = step * core_rms(x.shape[1])
    features = x if basis is None else x @ basis.T
    if basis is not None:
        spread *= math.sqrt(x.shape[1] / len(basis))
    solution = ridge(features * (spread / deviation)[:, None], y / deviation[:, None])
    found: F64 = solution.T * (spread / step)
    return found if basis is None else found @ basis


def ridge(features: F64, targets: F64) -> F64:
    """(k, n): the most likely unknowns of unit variance behind equations (T, k) of unit noise and answers (T, n)."""
    few = len(features) <= features.shape[1]
    gram = features @ features.T if few else features.T @ features
    gram[np.diag_indices(len(gram))] += 1
    solved = np.linalg.solve(gram, targets if few else features.T @ targets)
    return np.asarray(features.T @ solved if few else solved, dtype=np.float64)


def relative_error(estimate: F64, truth: F64, inputs: F32 | None = None) -> float:
    """‖(Ĉ − C)·X‖/‖C·X‖ on rows of real activations, or ‖Ĉ − C‖/‖C‖ without any; Frobenius norms.

    NaN where the truth is 0.
    """
    wrong, right = estimate - truth, truth
    if inputs is not None:
        x = inputs.astype(np.float64)
        wrong, right = x @ wrong.T, x @ right.T
    size = float(np.linalg.norm(right))
    return float(np.linalg.norm(wrong)) / size if size else math.nan
