"""What directions known beforehand are worth to an attacker who has fewer rows than a layer has columns.

Everybody who has the public base model can compute along which directions a layer's input varies. Training moves a
layer along the activations that it sees, so a core holds more along the main ones than along the others. A query along
a direction v, x̂ = ⌊k·v⌉, is answered with k·⟨C_j, v⟩ and noise, for every row C_j at once; a direction that was not
asked for stays unknown. After the k main directions the squared error of the core is what it holds outside them.

How much that is depends on base model and adapter. A vendor, who has both, measures it (``extraction.directed``), and
the ledger is handed this: a curve over the number of directions, and one peak.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from splitveil.private.core import core_rms, haar_orthogonal

F64 = NDArray[np.float64]
_GAUGES = 9
POINTS = 32
"""Of a measured curve; closer together where there are few directions."""


@dataclass(frozen=True)
class Directions:
    """How a core's squares lie along the directions that an attacker asks for, in the order of asking."""

    counts: tuple[int, ...]
    """Numbers of directions, ascending from 1 or more; the last is d."""
    outside: tuple[float, ...]
    """Of ‖C‖², outside the span of so many directions: from 1 down, never rising."""
    peak: float
    """The largest |⟨C_j, v⟩| over all rows of the core and all directions v, in units of what is expected along v: by
    default of c(d), ``core_rms``. It depends on the gauge of a publication; this is typical."""

    def __post_init__(self) -> None:
        """Raises ``ValueError`` for anything but such a curve."""
        points = list(zip(self.counts, self.outside, strict=True))
        ascending = all(a[0] < b[0] and a[1] >= b[1] for a, b in pairwise(points))
        whole = all(isinstance(count, int) and count > 0 and 0 <= share <= 1 for count, share in points)
        if not (points and ascending and whole and math.isfinite(self.peak) and self.peak > 0):
            raise ValueError("a curve of shares over ascending numbers of directions, and a peak, were expected")

    def left(self, asked: int) -> float:
        """Of ‖C‖², outside the first ``asked`` directions; between two points of the curve on a line."""
        counts, shares = (0, *self.counts), (1.0, *self.outside)
        after = bisect_right(counts, asked)
        if after == len(counts):
            return shares[-1]
        part = (asked - counts[after - 1]) / (counts[after] - counts[after - 1])
        return shares[after - 1] + part * (shares[after] - shares[after - 1])


ByLayer = Mapping[str, tuple[Directions, ...]]
"""By the name of a layer's first module: one curve for every order in which an attacker may ask."""


def along(core: F64, basis: F64, expected: F64 | None = None) -> Directions:
    """Of an integer core (rank, d), along the orthonormal directions ``basis`` (k, d) in the order of its rows.

    ``expected`` (k,), in integer units, is how large an attacker expects ⟨C_j, v⟩ to be, direction by direction: c(d)
    of all, unless it knows better. Of a core of zeros no direction holds more than another.
    """
    square = float((core**2).sum())
    if not square:
        return Directions((len(basis),), (0.0,), 1.0)
    parts = core @ basis.T
    held = np.cumsum((parts**2).sum(axis=0)) / square
    counts = _grid(len(basis))
    outside = np.minimum.accumulate(np.clip(1 - held[np.array(counts) - 1], 0.0, 1.0))
    peak = _typical_peak(parts / (core_rms(core.shape[1]) if expected is None else expected))
    # With few digits, as it is kept, and rounded in the attacker's favour.
    shares = tuple(math.floor(float(share) * 1e5) / 1e5 for share in outside)
    return Directions(counts, shares, math.ceil(1000 * peak) / 1000)


def _typical_peak(parts: F64) -> float:
    """The largest entry of ``parts`` (rank, k) to be expected in the random gauge of a publication: a median."""
    return float(np.median([np.abs(haar_orthogonal(len(parts)) @ parts).max() for _ in range(_GAUGES)]))


def _grid(last: int) -> tuple[int, ...]:
    return tuple(sorted({max(1, math.ceil(last * (point / POINTS) ** 2)) for point in range(1, POINTS + 1)}))


def error_along(found: Directions, width: int, relative_noise: float, rows: int) -> float:
    """Relative error of a core of ``width`` columns after ``rows`` rows of queries along ``found``.

    ``relative_noise`` is the standard deviation of what one answer says of ⟨C_j, v⟩, in units of what is expected of
    it. Rows are shared out evenly among as many directions as leaves least: in much noise those are few, asked often.
    """
    most = min(rows, found.counts[-1])
    choices = {most, *(count for count in found.counts if count < most)} - {0}
    squares = [found.left(k) + k / width * relative_noise**2 * k / rows for k in choices]
    return math.sqrt(min([1.0, *squares]))


def directions_worth_asking(width: int, relative_noise: float, rows: int) -> int:
    """How many of ``width`` directions to share ``rows`` rows out among, for who does not know what each holds."""
    flat = rows / max(2 * relative_noise**2, 1.0)
    return max(1, min(rows, width, math.floor(flat)))
