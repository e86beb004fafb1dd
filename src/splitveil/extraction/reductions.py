"""Lattice reduction where it works, and where it does not: published halves from the weakest up, on weights at random.

What falls does so on purpose. The parameter set is one for tests, or the pad is broken: it has a ring element and a
client's secret of its own, so that C is hidden by f alone (design note *reduction*, Lemma 2). Nothing here is served.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from splitveil.extraction.hint import Reduced, System, attack_layer, columns, effort, system, whole_dimension
from splitveil.lattice import sampling
from splitveil.lattice.parameters import DEFAULT, INSECURE_TEST
from splitveil.lattice.randomness import public_element
from splitveil.lattice.ring import FixedElement, reflect
from splitveil.private.core import LayerSpec, core_rms, integer_core
from splitveil.private.lattice_served import hints, publish

I32 = NDArray[np.int32]
BROKEN = f"{DEFAULT.name}, the pad broken"
WEAK_WIDTHS, BROKEN_WIDTH, BEYOND_WIDTHS = (16, 32, 64), 64, (256, 1024)


@dataclass(frozen=True)
class Trial:
    """One reduction, tried or not."""

    what: str
    width: int
    dimension: int
    """Of the lattice."""
    found: bool | None
    """Whether the integer core came out; None where the lattice is larger than this attack reduces."""
    seconds: float
    """Of one core."""
    effort: str
    """What the problem takes, as estimated."""


def trials(adapted: int | None = None) -> Iterator[Trial]:
    """What falls, what withstands the same reduction, and what is not attempted; last an adapter's layer so wide.

    Takes half a minute. Raises ``ConfigurationError`` where python-flint is not installed.
    """
    for width in WEAK_WIDTHS:
        yield _weak(width)
    yield from _broken(BROKEN_WIDTH)
    for width in BEYOND_WIDTHS:
        bare = _bare(np.empty((DEFAULT.ring_degree, width), dtype=np.int64))
        yield Trial(BROKEN, width, bare.taken(bare.enough).dimension, None, 0.0, effort(bare.instance()))
    real = [(f"{DEFAULT.name}, the real pad", BROKEN_WIDTH)]
    real += [] if adapted is None else [(f"{DEFAULT.name}, this adapter's narrowest", adapted)]
    for what, width in real:
        # With the core known, hence at least this.
        yield Trial(what, width, whole_dimension(DEFAULT, width), None, 0.0, effort(DEFAULT.instances()[1]))


def _weak(width: int) -> Trial:
    """A publication under the set for tests."""
    spec, core = _layer(width)
    _, publication = publish([spec], noise=0.0, parameters=INSECURE_TEST)
    equations = system(publication, 0)
    began = time.process_time()
    found = attack_layer(publication, 0)
    seconds = time.process_time() - began
    right = found is not None and bool((found == core).all())
    dimension = equations.taken(equations.enough).dimension
    return Trial(INSECURE_TEST.name, width, dimension, right, seconds, effort(equations.instance()))


def _broken(width: int) -> Iterator[Trial]:
    """The broken pad; then the same reduction on the real hints of the same core, which the real pad covers."""
    spec, core = _layer(width)
    _, publication = publish([spec], noise=0.0, parameters=DEFAULT)
    data, pad = (public_element(publication.id, publication.seed, width, i, DEFAULT.ring_degree) for i in range(2))
    error = sampling.discrete_gaussian(len(core) * DEFAULT.ring_degree, DEFAULT.hint_sigma).reshape(len(core), -1)
    none = np.zeros((len(core), DEFAULT.pad_width), dtype=np.int32)
    elements = [FixedElement.of(reflect(one)) for one in (data, pad)]
    broken = hints(core, none, (error & 0xFFFFFFFF).astype(np.uint32), elements, DEFAULT)
    bare = _bare(columns(data, width))
    taken = bare.taken(bare.enough)
    began = time.process_time()
    reduced = Reduced(taken)
    basis = time.process_time() - began
    real = publication.layers[0].hint
    for what, hint, work in (
        (BROKEN, broken, effort(bare.instance())),
        (f"{DEFAULT.name}, the real hints of the same layer", real, effort(DEFAULT.instances()[1])),
    ):
        began = time.process_time()
        found = [] if hint is None else [reduced.solve(row) for row in hint]
        seconds = basis + time.process_time() - began
        right = [one is not None and bool((one == row).all()) for one, row in zip(found, core, strict=True)]
        yield Trial(what, width, taken.dimension, all(right), seconds, work)


def _bare(matrix: NDArray[np.int64]) -> System:
    """The equations of a hint in which a row of the core is hidden by f alone."""
    width = matrix.shape[1]
    return System(matrix, np.full(width, core_rms(width)), DEFAULT.hint_sigma)


def _layer(width: int) -> tuple[LayerSpec, I32]:
    """Two rows of weights at random, and the integers that they are published as."""
    weights = np.random.default_rng(width).standard_normal((2, width)).astype(np.float32)
    return LayerSpec(weights, None, 1.0, (("m", 2),)), integer_core(weights.astype(np.float64)).values
