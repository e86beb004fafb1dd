"""Spearman's rank correlation, with its interval: does the information profile predict the attacks' scores?"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from splitveil.errors import ConfigurationError

F64 = NDArray[np.float64]

_FEWEST = 4
_EXACT = 8
_PERMUTATIONS = 20_000
_NORMAL = 1.959964


@dataclass(frozen=True)
class RankCorrelation:
    """ρ in [−1, 1], or NaN with the reason."""

    rho: float
    low: float
    high: float
    """95 % interval by Fisher's transformation with Bonett and Wright's standard error (2000). It takes points for
    independent; neighbouring blocks of one model are not, so it is too narrow for a single profile."""
    p_value: float
    """Two-sided: the share of permutations with |ρ| at least as large, all of them for up to eight points."""
    points: int
    """Points with both values measured."""
    dropped: int
    """Points left out because a value was not measured."""
    reason: str = ""


def spearman(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> RankCorrelation:
    """Rank correlation of two equally long sequences; NaN means not measured, and drops the point. Ties share a rank.

    Raises ``ConfigurationError`` where the lengths differ.
    """
    if len(first) != len(second):
        raise ConfigurationError(f"expected as many values on both sides, got {len(first)} and {len(second)}")
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    measured = ~(np.isnan(a) | np.isnan(b))
    a, b = a[measured], b[measured]
    points, dropped = len(a), int((~measured).sum())
    reason = ""
    if points < _FEWEST:
        reason = f"{points} points, needs at least {_FEWEST}"
    elif np.ptp(ranks(a)) == 0 or np.ptp(ranks(b)) == 0:
        reason = "all values of one side are equal"
    if reason:
        return RankCorrelation(math.nan, math.nan, math.nan, math.nan, points, dropped, reason)
    of_a, of_b = _unit(ranks(a)), _unit(ranks(b))
    rho = float(np.clip(of_a @ of_b, -1, 1))
    low, high = _interval(rho, points)
    return RankCorrelation(rho, low, high, _p_value(of_a, of_b, rho, seed), points, dropped)


def ranks(values: F64) -> F64:
    """Ranks from 1, equal values sharing the mean of theirs. Infinity is the largest value."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean = last - (counts - 1) / 2
    result: F64 = mean[inverse]
    return result


def _unit(values: F64) -> F64:
    centred = values - values.mean()
    result: F64 = centred / np.linalg.norm(centred)
    return result


def _interval(rho: float, points: int) -> tuple[float, float]:
    # One exchange of neighbours moves ρ by this much. At ±1 the transformation is infinite, and the interval would
    # have no width however few the points, as a bootstrap's has none; so ρ counts as half a step inside.
    step = 12 / (points**3 - points)
    inside = max(-1 + step / 2, min(1 - step / 2, rho))
    error = math.sqrt((1 + inside**2 / 2) / (points - 3))
    centre = math.atanh(inside)
    low, high = math.tanh(centre - _NORMAL * error), math.tanh(centre + _NORMAL * error)
    return min(low, rho), max(high, rho)


def _p_value(of_a: F64, of_b: F64, rho: float, seed: int) -> float:
    points = len(of_a)
    almost = abs(rho) - 1e-9  # rounding must not part equal correlations
    if points <= _EXACT:
        orders = np.array(list(itertools.permutations(range(points))))
        return float(np.mean(np.abs(of_b[orders] @ of_a) >= almost))
    draw = np.random.default_rng(seed)
    shuffled = draw.permuted(np.broadcast_to(of_b, (_PERMUTATIONS, points)), axis=1)
    extreme = int(np.sum(np.abs(shuffled @ of_a) >= almost))
    return (extreme + 1) / (_PERMUTATIONS + 1)
