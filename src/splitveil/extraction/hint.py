"""The published half alone: a row of the core out of its hint, by lattice reduction.

    hint_j = Σ_k ā_k·C_{j,k} + ā_pad·P_j(X^t) + f_j

is a system of N noisy linear equations mod q, the unknowns being the row's d coordinates and its pad's n_pad, all
small: LWE with the secret (C_j, P_j) and the error f_j. Kannan's embedding makes them a short vector of a lattice of
dimension N + d + n_pad + 1, which LLL finds if that is small enough. A publication under a real parameter set has 2048
equations and more than 1024 unknowns: no reduction that anybody can run gets there (``hardness``).

LLL is FLINT's, by python-flint (MIT), which has wheels for Linux, macOS and Windows; the extra ``extract``.
"""

import importlib
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splitveil.errors import ConfigurationError
from splitveil.lattice.hardness import LweInstance, estimate
from splitveil.lattice.parameters import ParameterSet, Q
from splitveil.lattice.randomness import public_element
from splitveil.lattice.ring import FixedElement, multiply, reflect
from splitveil.private.core import core_rms
from splitveil.private.published import Publication

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
U32 = NDArray[np.uint32]
MOST_DIMENSIONS = 200
"""Of a lattice that LLL reduces in seconds to minutes."""
_LLL = 2  # the block size at which BKZ is LLL
_SHAPE = math.sqrt(2 * math.pi * math.e)  # a normal of deviation σ has log2(σ·√(2πe)) bits


@dataclass(frozen=True, repr=False)
class System:
    """Noisy linear equations mod q: h = matrix·secret + f."""

    matrix: I64 = field(repr=False)
    """(equations, unknowns), mod q."""
    deviations: F64
    """(unknowns,) standard deviation of each coordinate of the secret."""
    error: float
    """σ of f."""

    @property
    def dimension(self) -> int:
        """Of the lattice in which the answer is a short vector."""
        return sum(self.matrix.shape) + 1

    def instance(self) -> LweInstance:
        """The LWE problem, all unknowns as wide as their root mean square is."""
        spread = float(np.sqrt((self.deviations**2).mean()))
        return LweInstance("hint", self.matrix.shape[1], Q, spread, self.error, samples=self.matrix.shape[0])

    @property
    def enough(self) -> int:
        """Equations that leave one answer with room to spare: 1.7 times the bits that are unknown."""
        unknown = float(np.log2(_SHAPE * self.deviations).sum())
        each = math.log2(Q) - math.log2(_SHAPE * self.error)
        return min(len(self.matrix), math.ceil(1.7 * unknown / each))

    def taken(self, equations: int) -> "System":
        """The first ``equations`` alone."""
        return System(self.matrix[:equations], self.deviations, self.error)

    def fits(self, secret: I64, hint: U32) -> bool:
        """What an attacker can check without knowing the answer: all that is left of the hint is as small as f."""
        left = (hint.astype(object) - self.matrix.astype(object) @ secret.astype(object)) % Q
        centred = np.where(left >= Q // 2, left - Q, left).astype(np.float64)
        return bool(np.sqrt((centred**2).mean()) < 2 * self.error)


def columns(element: U32, count: int, stride: int = 1) -> I64:
    """The matrix of c ↦ ā·c(X^stride) for c with ``count`` coefficients: (N, count), mod q."""
    degree = len(element)
    unit = np.zeros((count, degree), dtype=np.int32)
    unit[np.arange(count), stride * np.arange(count)] = 1
    return multiply(FixedElement.of(reflect(element)), unit).astype(np.int64).T


def system(publication: Publication, layer: int) -> System:
    """The equations of each hint of a layer; they differ in the hint alone.

    Raises ``ConfigurationError`` for an engine without hints.
    """
    published, parameters = publication.layers[layer], publication.parameters
    if publication.engine != "lattice":
        raise ConfigurationError(f"the {publication.engine} engine publishes no hints")
    width, degree = published.width, parameters.ring_degree
    blocks = parameters.blocks(width)
    parts = []
    for block in range(blocks + 1):
        element = public_element(publication.id, publication.seed, width, block, degree)
        if block < blocks:
            parts.append(columns(element, min(degree, width - block * degree)))
        else:
            parts.append(columns(element, parameters.pad_width, parameters.pad_stride))
    deviations = np.r_[np.full(width, core_rms(width)), np.full(parameters.pad_width, parameters.pad_sigma)]
    return System(np.hstack(parts), deviations, parameters.hint_sigma)


class Reduced:
    """A system's lattice, reduced once; every hint is then one more vector."""

    def __init__(self, equations: System) -> None:
        if equations.dimension > MOST_DIMENSIONS:
            raise ConfigurationError(out_of_reach(equations.dimension, equations.instance()))
        self._system = equations
        count, unknowns = equations.matrix.shape
        # Every coordinate of the vector that is looked for gets about the same size.
        size = max(float(equations.deviations.max()), equations.error)
        self._weights = np.maximum(1, np.rint(size / equations.deviations)).astype(np.int64)
        self._weight = max(1, round(size / equations.error))
        self._mark = max(1, round(size))
        modulus = np.hstack([Q * self._weight * np.eye(count, dtype=np.int64), np.zeros((count, unknowns), np.int64)])
        known = np.hstack([self._weight * equations.matrix.T, np.diag(self._weights)])
        self._basis = _reduced(np.vstack([modulus, known]).tolist())

    def solve(self, hint: U32) -> I64 | None:
        """The secret behind a hint, or None where no short vector explains it."""
        count = len(self._system.matrix)
        unknowns = self._system.matrix.shape[1]
        target = [self._weight * int(v) for v in hint[:count]]
        found = _reduced([[*row, 0] for row in self._basis] + [[*target, *[0] * unknowns, self._mark]])
        marked = [row for row in found if abs(row[-1]) == self._mark]
        for row in sorted(marked, key=lambda row: sum(v * v for v in row)):
            sign = -1 if row[-1] > 0 else 1
            guess = np.array([sign * v for v in row[count:-1]], dtype=np.int64)
            if not (guess % self._weights).any() and self._system.fits(guess // self._weights, hint[:count]):
                secret: I64 = guess // self._weights
                return secret
        return None


def attack_layer(publication: Publication, layer: int) -> I64 | None:
    """A layer's integer core (rank, d) from its hints alone, or None where the reduction finds nothing.

    Raises ``ConfigurationError`` with the estimate of the work for a lattice that is out of reach.
    """
    published = publication.layers[layer]
    parameters = publication.parameters
    dimension = whole_dimension(parameters, published.width)
    if dimension > MOST_DIMENSIONS:
        # With the core known, hence at least this.
        raise ConfigurationError(out_of_reach(dimension, parameters.instances()[1]))
    equations = system(publication, layer)
    reduced = Reduced(equations.taken(equations.enough))
    if published.hint is None:
        return None
    found = []
    for hint in published.hint:
        secret = reduced.solve(hint)
        if secret is None or not equations.fits(secret, hint):
            return None
        found.append(secret[: published.width])
    return np.array(found)


def whole_dimension(parameters: ParameterSet, width: int) -> int:
    """Of the lattice with all equations of a hint and all that is unknown in them."""
    return parameters.ring_degree + width + parameters.pad_width + 1


def out_of_reach(dimension: int, instance: LweInstance) -> str:
    """What solving ``instance`` would take."""
    return (
        f"out of reach: the lattice has dimension {dimension}, this attack reduces up to {MOST_DIMENSIONS}; "
        f"estimated: {effort(instance)}"
    )


def effort(instance: LweInstance) -> str:
    """The cheaper of the primal and the dual attack, in words."""
    hardness = estimate(instance)
    block = min(hardness.primal.block_size, hardness.dual.block_size)
    bits = hardness.bits_core_svp
    if math.isinf(bits):
        return "no block size is enough"
    return "LLL is enough" if block == _LLL else f"block size {block}, {bits:.0f} bits by core-SVP"


def _reduced(rows: list[list[int]]) -> list[list[int]]:
    """LLL. Raises ``ConfigurationError`` where python-flint is not installed."""
    try:
        flint: Any = importlib.import_module("flint")
    except ImportError:
        raise ConfigurationError("lattice reduction needs FLINT: pip install 'splitveil[extract]'") from None
    return [[int(value) for value in row] for row in flint.fmpz_mat(rows).lll().tolist()]
