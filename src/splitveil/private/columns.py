"""Columns of a core: how an attacker asks for them who takes all directions for alike, and the error that this leaves.

* *n rows a column*, n ≥ 1: the multiples k_1·C_ij, …, k_n·C_ij mod q. The first is small enough not to wrap, the others
  wrap and are unwrapped with what the earlier ones tell (the modular ladder, protocol design, section 6). They are
  decoded together, by maximum likelihood over the integers: (k_1, …, k_n)·ℤ mod q is a code of one dimension in the
  n-dimensional torus, and the multipliers are searched for the least expected error.
* *m columns a row*, where answers are so precise that the integer C_ij fits below the next column's digit.

A column that is not asked for has error 1. Rows that are no multiple of d are shared out between the two neighbouring
ways on the lower convex hull of (rows a column, squared error).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from splitveil.lattice.parameters import ParameterSet, Q
from splitveil.private.bound import HALF, budget
from splitveil.private.core import core_rms

F64 = NDArray[np.float64]
MARGIN = 4.5
"""Standard deviations of answer noise that a digit leaves room for."""
MOST_ROWS = 12
"""Rows a column beyond which no scheme is searched; noise that needs more is averaged first."""
MOST_PACKED = 4
TYPICAL_PEAK = 4.0
"""κ_c where the weights are not at hand: near the low end of real adapters, 3.9 to 6.4, in the attacker's favour."""
_CANDIDATES = 64
_EXCHANGED = 4
_CERTAIN = 1e-3  # expected wrong entries of a whole core beyond which no more rows are worth asking for
_AS_LIKELY_AS_NOT = math.log(2)  # expected wrong entries at which there are none with probability 1/2


@dataclass(frozen=True)
class Channel:
    """What determines how fast one layer leaks."""

    width: int
    """d: inputs of the layer."""
    rank: int
    """Rows of the core."""
    rms: float
    """c: r.m.s. entry of the integer core."""
    peak: float
    """The largest entry to be expected, in absolute value."""
    sigma: float
    """σ_g in force, in integer units."""

    @classmethod
    def of(
        cls,
        parameters: ParameterSet,
        width: int,
        rank: int,
        norm_bound: int,
        noise: float,
        peak_ratio: float = TYPICAL_PEAK,
    ) -> "Channel":
        """From published numbers, and κ_c = ``peak_ratio``, the peak of the core's entries in units of c(d).

        Both κ_c and σ_g are rounded up, by less than 0.25 and 1 %, so that layers which differ little share a plan.
        """
        rms = core_rms(width)
        sigma = budget(parameters, width, norm_bound, noise).answer_sigma
        unit = 10.0 ** (math.floor(math.log10(sigma)) - 2)
        return cls(width, rank, rms, max(1.0, cls.rounded_peak(peak_ratio) * rms), math.ceil(sigma / unit) * unit)

    @staticmethod
    def rounded_peak(ratio: float) -> float:
        """κ as an attacker is taken to have guessed it: up to the next quarter."""
        return math.ceil(4 * ratio) / 4


@dataclass(frozen=True)
class Scheme:
    """One way to ask for a column."""

    multipliers: tuple[int, ...]
    """One a row for a column that is asked for in several; one a column for columns that share a row."""
    packed: bool
    """Whether columns share a row."""
    repeats: int
    """How often every row is asked, to be averaged."""
    square: float
    """Expected squared error, relative to c²."""
    wrong: float
    """Expected number of wrong entries in a column."""
    exact: bool
    """Whether a whole core asked for in this way comes back as the integers it is, but for one time in a thousand."""

    @property
    def rows(self) -> float:
        """Rows for a column; a fraction where columns share one."""
        return 1 / len(self.multipliers) if self.packed else float(len(self.multipliers) * self.repeats)


@dataclass(frozen=True)
class Plan:
    """How many columns to ask for in which way; the other columns of the layer are left unseen."""

    parts: tuple[tuple[int, Scheme], ...]
    channel: Channel = field(repr=False)

    @property
    def rows(self) -> int:
        """What the plan asks for."""
        return sum(math.ceil(columns * scheme.rows - 1e-9) for columns, scheme in self.parts)

    @property
    def error(self) -> float:
        """The relative error to be expected."""
        width = self.channel.width
        unseen = width - sum(columns for columns, _ in self.parts)
        return math.sqrt((unseen + sum(columns * scheme.square for columns, scheme in self.parts)) / width)

    @property
    def exact(self) -> bool:
        """Whether every integer of the core is right as likely as not."""
        complete = sum(columns for columns, _ in self.parts) == self.channel.width
        return complete and sum(columns * scheme.wrong for columns, scheme in self.parts) <= _AS_LIKELY_AS_NOT


def peak_ratio(cores: Sequence[NDArray[np.int32] | F64]) -> float:
    """κ_c: the largest entry of some integer cores of one width, in units of ``core_rms``. The vendor's to compute."""
    return max(float(np.abs(core).max()) / core_rms(core.shape[1]) for core in cores)


def plan(channel: Channel, rows: int) -> Plan:
    """The attack's plan for ``rows`` rows: two neighbouring schemes of the hull, and how many columns each gets."""
    if rows < 0:
        raise ValueError(f"a number of rows was expected, got {rows}")
    hull = schemes(channel)
    width = channel.width
    most = next((scheme for scheme in hull if scheme.exact), hull[-1])
    if rows >= math.ceil(width * most.rows):
        return Plan(((width, most),), channel)
    below = None
    for scheme in hull:
        if width * scheme.rows <= rows:
            below = scheme
            continue
        if below is None:
            return Plan(((min(width, math.floor(rows / scheme.rows + 1e-9)), scheme),), channel)
        # Columns of the richer scheme, as many as the rows left over by the poorer one pay for. A last shared row may
        # be incomplete, hence one row is set aside for it.
        spare = rows - math.ceil(width * below.rows)
        richer = max(0, math.floor(spare / (scheme.rows - below.rows)))
        return Plan(((richer, scheme), (width - richer, below)), channel)
    return Plan(((width, hull[-1]),), channel)


@lru_cache(maxsize=256)
def schemes(channel: Channel) -> tuple[Scheme, ...]:
    """The schemes on the lower convex hull, from the fewest rows a column on; the last one is exact if any is."""
    found: list[Scheme] = []
    for packed in range(MOST_PACKED, 1, -1):
        scheme = _packed(channel, packed)
        if scheme is not None:
            found.append(scheme)
    found.extend(_ladders(channel))
    points = [(0.0, 1.0), *((s.rows, s.square) for s in found)]
    keep: list[int] = []
    for index in range(len(points)):
        while len(keep) > 1 and _above(points[keep[-2]], points[keep[-1]], points[index]):
            keep.pop()
        if not keep or points[index][1] < points[keep[-1]][1]:
            keep.append(index)
    return tuple(found[index - 1] for index in keep if index)


def _above(first: tuple[float, float], middle: tuple[float, float], last: tuple[float, float]) -> bool:
    """Whether ``middle`` lies on or above the line from ``first`` to ``last``."""
    (x0, y0), (x1, y1), (x2, y2) = first, middle, last
    return (y1 - y0) * (x2 - x0) >= (y2 - y0) * (x1 - x0)


def direct_multiplier(sigma: float, peak: float) -> int:
    """The largest multiplier with which a value of at most ``peak`` is answered without wrapping; 0 if there is none.

    ``sigma`` is that of the answer's noise, of which ``MARGIN`` deviations have room.
    """
    return max(0, math.floor((HALF - MARGIN * sigma) / peak))


def averaged_sigma(sigma: float, repeats: int) -> float:
    """σ of the angle, in units of the modulus' integers, of the mean of ``repeats`` answers on the unit circle.

    σ/√repeats for noise far below q; what is left of noise as wide as q otherwise.
    """
    length = math.exp(-2 * (math.pi * sigma / Q) ** 2)
    if repeats == 1:
        return sigma
    return Q / (2 * math.pi) * math.sqrt((1 - length**4) / (2 * repeats)) / length


def _repeats(sigma: float) -> int:
    """Rows that are averaged before they are decoded, so that a step of the ladder tells more than the noise hides."""
    repeats = 1
    while averaged_sigma(sigma, repeats) > Q / 20:
        repeats *= 2
    return repeats


def _ladders(channel: Channel) -> list[Scheme]:
    """The best multipliers for 1, 2, 3 … rows a column, until the core comes back exactly."""
    repeats = _repeats(channel.sigma)
    table = _Table.of(channel, averaged_sigma(channel.sigma, repeats))
    chosen: list[int] = []
    found = [table.scheme(chosen, repeats)]
    while not found[-1].exact and len(found) < MOST_ROWS:
        chosen = table.extended(chosen)
        found.append(table.scheme(chosen, repeats))
    return found


@dataclass(frozen=True, repr=False)
class _Table:
    """Distances in the torus for the first multiplier and candidates for the others, so that sets of them are sums.

    The expected squared error of maximum-likelihood decoding has two parts. Near the truth it is that of rounding a
    Gaussian of σ/√Σk²; far from it, every local minimum of the distance between codewords is one more way to be wrong
    (union bound).
    """

    channel: Channel
    sigma: float
    multipliers: NDArray[np.int64]
    """The first, which does not wrap, and the candidates."""
    squares: NDArray[np.float32]
    """(multipliers, differences): centred(k·Δ mod q)², in units of σ², for Δ = 0, 1, 2, …"""

    @classmethod
    def of(cls, channel: Channel, sigma: float) -> "_Table":
        first = max(1, direct_multiplier(sigma, channel.peak))
        # The first multiplier alone tells integers apart that are farther apart than this.
        reach = min(int(2 * channel.peak), math.ceil(14 * sigma / first)) + 3
        candidates = np.geomspace(first, HALF - 1, _CANDIDATES)
        multipliers = np.concatenate([[first], candidates]).astype(np.int64) | 1
        differences = np.arange(reach, dtype=np.uint32)
        squares = np.empty((len(multipliers), reach), dtype=np.float32)
        for index, multiplier in enumerate(multipliers):
            turned = (differences * np.uint32(multiplier)).view(np.int32)
            squares[index] = np.square(turned.astype(np.float64) / sigma)
        return cls(channel, sigma, multipliers, squares)

    def extended(self, chosen: Sequence[int]) -> list[int]:
        """``chosen`` and one more candidate; then each is exchanged for a better one, as long as that pays."""
        best = [*chosen, 0]
        risk = math.inf
        improved = True
        while improved:
            improved = False
            # Of long sets only the new one is chosen: the gain of exchanges is small there, and their cost is not.
            for place in range(len(best) - 1, -1 if len(best) <= _EXCHANGED else len(best) - 2, -1):
                rest = self.squares[0] + sum(self.squares[i] for k, i in enumerate(best) if k != place)
                others = [i for k, i in enumerate(best) if k != place]
                for index in range(1, len(self.multipliers)):
                    square, _ = self._risk(rest + self.squares[index], [*others, index])
                    if square < risk * 0.999:
                        risk, improved = square, True
                        best[place] = index
        return best

    def scheme(self, chosen: Sequence[int], repeats: int) -> Scheme:
        square, wrong = self._risk(self.squares[[0, *chosen]].sum(axis=0), chosen)
        multipliers = (int(self.multipliers[0]), *sorted(int(self.multipliers[index]) for index in chosen))
        return Scheme(multipliers, False, repeats, square, wrong / self.channel.width, wrong < _CERTAIN)

    def _risk(self, distance: NDArray[np.float32], chosen: Sequence[int]) -> tuple[float, float]:
        """(expected squared error ÷ c², expected wrong entries of the core)."""
        total = float((self.multipliers[[0, *chosen]].astype(np.float64) ** 2).sum())
        square, odds = _rounding(self.sigma / math.sqrt(total))
        inner = distance[1:-1]
        dips = np.flatnonzero((inner < distance[:-2]) & (inner <= distance[2:]) & (inner < 15.0**2)) + 1
        gross = 2 * upper_tail(np.sqrt(distance[dips].astype(np.float64)) / 2)
        square += float((dips.astype(np.float64) ** 2 * gross).sum())
        wrong = (odds + float(gross.sum())) * self.channel.width * self.channel.rank
        return min(square / self.channel.rms**2, 1.0), wrong


def upper_tail(z: F64) -> F64:
    """P(Z > z) of a standard normal, z ≥ 0, from above by at most 10 % (Pollak 1956)."""
    out: F64 = np.exp(-(z**2) / 2) * math.sqrt(2 / math.pi) / (z + np.sqrt(z**2 + 8 / math.pi))
    return out


def _rounding(sigma: float) -> tuple[float, float]:
    """(mean square, probability of any) error of a Gaussian of ``sigma``, rounded where that helps."""
    if sigma > 2:
        return sigma**2, 1.0
    odds = [math.erfc((m - 0.5) / sigma / math.sqrt(2)) for m in range(1, 30)]
    rounded = sum((2 * m - 1) * odd for m, odd in enumerate(odds, 1))
    return min(sigma**2, rounded), odds[0]


def _packed(channel: Channel, columns: int) -> Scheme | None:
    """``columns`` columns in one row: all but the finest come back as integers. None if that leaves no room."""
    room = MARGIN * channel.sigma

    def digits(finest: int) -> list[int]:
        out = [finest]
        for _ in range(columns - 1):
            out.append(math.ceil(2 * (sum(out) * channel.peak + room)) + 1)
        return out

    def fits(finest: int) -> bool:
        return sum(digits(finest)) * channel.peak + room <= HALF

    if not fits(1):
        return None
    low, high = 1, int(HALF)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    multipliers = tuple(digits(low))
    square, odds = _rounding(channel.sigma / low)
    square = min(square / channel.rms**2, 1.0) / columns
    wrong = odds * channel.rank / columns
    return Scheme(multipliers, True, 1, square, wrong, wrong * channel.width < _CERTAIN)
