"""Figures with intervals: bootstrap over prompts (Efron & Tibshirani, *An Introduction to the Bootstrap*, §13.3)."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Figure:
    """A value with its interval. NaN means that it was not measured."""

    value: float
    low: float
    high: float
    prompts: int
    """Prompts that the value rests on."""


UNMEASURED = Figure(math.nan, math.nan, math.nan, 0)


def ratio(numerators: Any, denominators: Any, seed: int) -> Figure:
    """Σ numerators / Σ denominators over prompts (n,), with the percentile interval of ``LEVEL``.

    With denominators of 1 it is a mean. Prompts with a denominator of 0 do not count; with none left, it is NaN.
    """
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    above, below = above[below > 0], below[below > 0]
    if not len(below):
        return UNMEASURED
    picks = _picks(len(below), seed)
    return _figure(above.sum() / below.sum(), above[picks].sum(1) / below[picks].sum(1), len(below))


def mean(values: F64, seed: int) -> Figure:
    """Of all numbers of ``values`` (prompts, positions; NaN where there is none), resampled by prompt."""
    return ratio(np.nansum(values, 1), (~np.isnan(values)).sum(1), seed)


def quantile(values: F64, share: float, seed: int) -> Figure:
    """As ``mean``; the number below which ``share`` of the others are, by linear interpolation as in numpy."""
    values = values[~np.isnan(values).all(1)]
    if not len(values):
        return UNMEASURED
    owners, places = np.nonzero(~np.isnan(values))
    order = np.argsort(values[owners, places], kind="stable")
    numbers, owners = values[owners, places][order], owners[order]
    picks = _picks(len(values), seed)
    # How often each prompt was drawn, then how many of the numbers are at or before each of them.
    drawn = np.stack([np.bincount(pick, minlength=len(values)) for pick in picks])
    before = drawn[:, owners].cumsum(1)
    place = share * (before[:, -1:] - 1)
    low = numbers[(before > np.floor(place)).argmax(1)]
    high = numbers[(before > np.ceil(place)).argmax(1)]
    draws = low + (place - np.floor(place))[:, 0] * (high - low)
    return _figure(float(np.quantile(numbers, share)), draws, len(values))


def _picks(count: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))


def _figure(value: float, draws: F64, prompts: int) -> Figure:
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return Figure(float(value), float(low), float(high), prompts)
