"""Jointly Gaussian pairs, in closed form; and the capacity that added Gaussian noise leaves.

For Gaussians, I(X; Y) = −½ Σ log2(1 − ρᵢ²) over the canonical correlations ρᵢ, which is
½ log2 (|Σx| |Σy| / |Σxy|). The sample determinants of covariances are biased, but by an amount that depends on sizes
alone, through the expectation of the logarithm of a Wishart determinant, so the bias is taken off exactly.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from splitveil.errors import ConfigurationError
from splitveil.information.estimate import Claim, Estimate, refusal
from splitveil.information.pairs import (
    bootstrap,
    checked,
    folds,
    generator,
    permuted,
    standardised,
    student,
    without,
)

_FOLDS = 10
_PAIRS_PER_FEATURE = 4
_SINGULAR = 1e-9
_REPEATED = 0.05
_KURTOSIS_TOLERANCE = 0.05


@dataclass(frozen=True)
class Gaussian:
    """Mutual information of jointly Gaussian x and y; refuses whatever it can tell is not that."""

    name: ClassVar[str] = "gaussian"
    source: ClassVar[str] = "Cover and Thomas 2006, section 8.5; bias: Misra, Singh and Demchuk 2005; test: Mardia 1970"
    applies: ClassVar[str] = "jointly Gaussian vectors, at least four pairs a feature, neither a function of the other"

    def estimate(self, x: Tensor, y: Tensor, *, seed: int = 0, groups: Tensor | None = None) -> Estimate:
        """See ``Estimator``. Interval: jackknife over ten folds."""
        x, y, ids = checked(x, y, groups)
        pairs = x.shape[0]
        if y.ndim == 1:
            return refusal(self.name, pairs, "y holds ids, and a joint Gaussian needs real vectors")
        if max(_repeated(x, ids), _repeated(y, ids)) > _REPEATED:
            return refusal(self.name, pairs, "values come again in other groups: constant, or drawn from a list")
        x, y = _spanning(x), _spanning(y)
        features = x.shape[1] + y.shape[1]
        if pairs < _PAIRS_PER_FEATURE * features or int(ids.max()) + 1 < _FOLDS:
            return refusal(
                self.name, pairs, f"{features} features and {pairs} pairs: needs four pairs a feature and ten groups"
            )
        joint = torch.cat([x, y], 1)
        if torch.linalg.eigvalsh(torch.cov(joint.T))[0] < _SINGULAR:
            return refusal(self.name, pairs, "one of x and y is a linear function of the other: infinitely many bits")
        excess = _kurtosis_excess(joint)
        # Where the excess is drawn from truly Gaussian pairs, this is its standard error (Mardia 1970).
        allowed = max(_KURTOSIS_TOLERANCE, 4 * math.sqrt(8 / (features * (features + 2) * pairs)))
        if abs(excess) > allowed:
            return refusal(
                self.name,
                pairs,
                f"not jointly Gaussian: Mardia's kurtosis is off by {excess:+.0%}, more than {allowed:.0%}",
            )
        draw = generator(seed)
        bits = _bits(x, y)
        parts = [without(held, pairs) for held in folds(ids, _FOLDS, draw)]
        jackknife = torch.tensor([_bits(x[kept], y[kept]) for kept in parts])
        error = math.sqrt((_FOLDS - 1) * jackknife.var(correction=0).item())
        low, high = student(jackknife, error)
        shift = bits - jackknife.mean().item()
        floor = _bits(x, permuted(y, draw))
        return Estimate(self.name, Claim.VALUE, bits, low + shift, high + shift, floor, pairs, math.nan)


@dataclass(frozen=True)
class Capacity:
    """The most that x + N(0, ``noise``² I) can tell about x, and so about anything that x was made from.

    For x of covariance Σ the bound is ½ Σ log2(1 + λᵢ/σ²) over the eigenvalues λᵢ of Σ: of all x with this covariance
    the Gaussian one gets most through. Σ is estimated, and a covariance fitted to the very rows it is applied to
    would give too small a bound. So a Gaussian output density q is fitted on other folds, and the figure is the
    mean of D(p(·|x) ‖ q) over the held-out rows, an upper bound in expectation whichever q is (the golden formula).
    The bound is for one row; a text of T tokens sends T of them. y is not looked at, so there is no permuted floor.
    """

    noise: float
    """σ, the standard deviation of the noise in every coordinate."""

    name: ClassVar[str] = "capacity"
    source: ClassVar[str] = "Shannon 1948; Telatar 1999 for vectors; golden formula: Polyanskiy and Wu 2025, chapter 4"
    applies: ClassVar[str] = (
        "any x to which Gaussian noise of known size is added; an upper bound, tight for Gaussian x"
    )

    def __post_init__(self) -> None:
        if not (self.noise >= 0 and math.isfinite(self.noise)):
            raise ConfigurationError(f"noise is a standard deviation, finite and at least 0; got {self.noise}")

    def estimate(self, x: Tensor, y: Tensor, *, seed: int = 0, groups: Tensor | None = None) -> Estimate:
        """See ``Estimator``; x is what the noise is added to, before it. Interval: bootstrap over held-out rows."""
        x, _, ids = checked(x, y, groups)
        pairs = x.shape[0]
        if self.noise == 0:
            return refusal(self.name, pairs, "without noise a real vector's capacity is unbounded")
        draw = generator(seed)
        parts = folds(ids, _FOLDS, draw)
        if len(parts) < 2:
            return refusal(self.name, pairs, "needs at least two groups of pairs")
        values = torch.empty(pairs, dtype=torch.double)
        for held in parts:
            values[held] = self._divergence(x[held], x[without(held, pairs)])
        low, high = bootstrap(values, ids, draw)
        return Estimate(self.name, Claim.AT_MOST, values.mean().item(), low, high, math.nan, pairs, math.nan)

    def _divergence(self, x: Tensor, others: Tensor) -> Tensor:
        """D(N(x, σ²I) ‖ N(m, Σ + σ²I)) in bits, (rows,), with m and Σ those of ``others``."""
        mean = others.mean(0)
        centred = others - mean
        values, vectors = torch.linalg.eigh(centred.T @ centred / others.shape[0])
        ratio = 1 + values.clamp(min=0) / self.noise**2
        scores = (x - mean) @ vectors / self.noise
        nats = 0.5 * ((1 / ratio).sum() + (scores.square() / ratio).sum(1) - x.shape[1] + ratio.log().sum())
        bits: Tensor = nats / math.log(2)
        return bits


def _repeated(x: Tensor, groups: Tensor) -> float:
    """The share of rows that occur in more than one group; of a real vector's, none do."""
    row = torch.unique(x, dim=0, return_inverse=True)[1]
    first = torch.full((len(x),), len(x)).scatter_reduce(0, row, groups, "amin")
    last = torch.full((len(x),), -1).scatter_reduce(0, row, groups, "amax")
    return (first != last)[row].double().mean().item()


def _spanning(x: Tensor) -> Tensor:
    """``x`` in coordinates of unit variance, without directions in which it does not vary."""
    scaled = standardised(x, x)
    values, vectors = torch.linalg.eigh(scaled.T @ scaled / max(len(x) - 1, 1))
    kept = values > _SINGULAR * values[-1].clamp(min=_SINGULAR)
    spanning: Tensor = scaled @ vectors[:, kept] / values[kept].sqrt()
    return spanning


def _kurtosis_excess(joint: Tensor) -> float:
    """Mardia's kurtosis of (pairs, features), relative to what Gaussian pairs have, less 1."""
    pairs, features = joint.shape
    centred = joint - joint.mean(0)
    covariance = centred.T @ centred / pairs
    distances = (centred @ torch.linalg.inv(covariance) * centred).sum(1)
    expected = features * (features + 2) * (pairs - 1) / (pairs + 1)
    ratio: float = distances.square().mean().item() / expected
    return ratio - 1


def _bits(x: Tensor, y: Tensor) -> float:
    """Unbiased for Gaussian pairs."""
    freedom = x.shape[0] - 1
    joint = torch.cov(torch.cat([x, y], 1).T)
    d, k = x.shape[1], y.shape[1]
    plain = torch.logdet(joint[:d, :d]) + torch.logdet(joint[d:, d:]) - torch.logdet(joint)
    bias = _log_wishart(freedom, d) + _log_wishart(freedom, k) - _log_wishart(freedom, d + k)
    return 0.5 * (plain.item() - bias) / math.log(2)


def _log_wishart(freedom: int, features: int) -> float:
    """E ln|W| − ln|Σ| of a Wishart matrix, without the terms that cancel in ``_bits``."""
    steps = torch.arange(features, dtype=torch.double)
    return torch.digamma((freedom - steps) / 2).sum().item()
