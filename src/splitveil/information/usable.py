"""Usable information about a token: by how much a bounded reader of x is less surprised than without x.

The reader is a Gaussian discriminant with shared covariances between and within tokens, in closed form. For a token
seen n times, x is Gaussian around its shrunken mean, with what n examples leave of the variance between tokens added
to the variance within; for one never seen, around the overall mean with all of the variance. That suits few examples a
token, which is what an attacker with little shadow text has.

It is bounded: what only a deeper reader, or one with more pairs, could use is not counted, although it is there.
Without noise every block of a language model determines its input in theory, and Shannon's information need not fall
with depth. The usable part does.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from splitveil.information.estimate import Claim, Estimate, refusal
from splitveil.information.pairs import bootstrap, checked, folds, generator, permuted, standardised, without

_FOLDS = 5
_CALIBRATION = 5
_SHRINKAGE = (1e-3, 0.1)
_TEMPERATURES = (0.0, 0.03, 0.06, 0.1, 0.2, 0.35, 0.6, 1.0, 1.7)
_MIXTURES = (0.001, 0.01, 0.05, 0.2)


@dataclass(frozen=True, repr=False)
class Usable:
    """V-information of x about a discrete y: held-out entropy of the marginal − held-out cross-entropy of the reader.

    A reader that ignores x is among those chosen from, so useless x gives about 0. It is a lower bound on mutual
    information up to D(p(y) ‖ fitted marginal), which is the same for every x that is read for the same y.
    """

    name: ClassVar[str] = "usable"
    source: ClassVar[str] = "Xu et al. 2020 (V-information); reader: Ioffe 2006 (probabilistic linear discriminant)"
    applies: ClassVar[str] = "discrete y (tokens); at least so much can be read linearly, with so many examples"

    def estimate(self, x: Tensor, y: Tensor, *, seed: int = 0, groups: Tensor | None = None) -> Estimate:
        """See ``Estimator``. Interval: bootstrap over held-out pairs of five folds. Limit: the marginal's entropy.

        The alphabet is what occurs in ``y``, in both entropies.
        """
        x, y, ids = checked(x, y, groups)
        pairs = x.shape[0]
        if y.ndim != 1:
            return refusal(self.name, pairs, "y holds real vectors, and the reader predicts one of finitely many ids")
        y = torch.unique(y, return_inverse=True)[1]
        alphabet = int(y.max()) + 1
        if alphabet < 2 or int(ids.max()) + 1 < 4 * _FOLDS:
            return refusal(self.name, pairs, f"{alphabet} different ids; needs two, in at least {4 * _FOLDS} groups")
        draw = generator(seed)
        parts = folds(ids, _FOLDS, draw)
        gains, entropy = _gains(x, y, alphabet, ids, parts, draw)
        low, high = bootstrap(gains, ids, draw)
        floor, _ = _gains(x, permuted(y, draw), alphabet, ids, parts, draw)
        return Estimate(self.name, Claim.AT_LEAST, gains.mean().item(), low, high, floor.mean().item(), pairs, entropy)


@dataclass(frozen=True, repr=False)
class _Marginal:
    """The distribution of ids without x: observed shares, and Good and Turing's share for all that were not seen."""

    counts: Tensor
    """(alphabet,)"""
    unseen: float
    """Probability of all ids together that were not seen."""

    @classmethod
    def fit(cls, y: Tensor, alphabet: int) -> "_Marginal":
        counts = torch.bincount(y, minlength=alphabet).double()
        if bool((counts > 0).all()):
            return cls(counts, 0.0)
        singles = (counts == 1).sum().item()
        return cls(counts, min(max(singles, 1.0), 0.5 * len(y)) / len(y))

    def log(self) -> Tensor:
        """Natural logarithms, (alphabet,)."""
        missing = self.counts == 0
        share = self.counts / self.counts.sum() * (1 - self.unseen)
        return torch.where(missing, self.unseen / missing.sum().clamp(min=1), share).log()


@dataclass(frozen=True, repr=False)
class _Reader:
    """A discriminant along axes on which the variance within tokens is 1 and that between them is ``between``."""

    origin: Tensor
    axes: Tensor
    between: Tensor
    marginal: _Marginal
    means: Tensor
    """(alphabet, axes): sample means of the seen ids."""
    temperature: float = 1.0
    mixture: float = 0.01

    @classmethod
    def fit(cls, x: Tensor, y: Tensor, alphabet: int, shrinkage: float) -> "_Reader":
        counts = torch.bincount(y, minlength=alphabet).double()
        origin = x.mean(0)
        sums = torch.zeros(alphabet, x.shape[1], dtype=torch.double).index_add_(0, y, x - origin)
        means = sums / counts.clamp(min=1)[:, None]
        residual = x - origin - means[y]
        seen = int((counts > 0).sum())
        within = residual.T @ residual / max(len(y) - seen, 1)
        total = (x - origin).T @ (x - origin) / len(y)
        size = total.diagonal().mean().clamp(min=1e-12)
        eye = torch.eye(x.shape[1], dtype=torch.double)
        within = (1 - shrinkage) * within + shrinkage * within.diagonal().diag() + 1e-4 * size * eye
        lower = torch.linalg.cholesky(within)
        whitened = torch.linalg.solve_triangular(lower, total, upper=False)
        whitened = torch.linalg.solve_triangular(lower, whitened.T, upper=False)
        values, vectors = torch.linalg.eigh(0.5 * (whitened + whitened.T))
        axes = torch.linalg.solve_triangular(lower.T, vectors, upper=True)
        return cls(origin, axes, (values - 1).clamp(min=0), _Marginal.fit(y, alphabet), means @ axes)

    def evidence(self, x: Tensor) -> Tensor:
        """Log-likelihood of every id, up to what they share: (rows, alphabet)."""
        place = (x - self.origin) @ self.axes
        counts = self.marginal.counts[:, None]
        weight = counts * self.between / (counts * self.between + 1)
        variance = 1 + self.between / (counts * self.between + 1)
        means = weight * self.means
        linear = place @ (means / variance).T - 0.5 * place.square() @ (1 / variance).T
        return linear - 0.5 * (means.square() / variance + variance.log()).sum(1)

    def read(self, evidence: Tensor, y: Tensor) -> Tensor:
        """Log-probability of the true ids ``y`` (rows,) by Bayes' rule, the evidence weighted by the temperature."""
        posterior = torch.log_softmax(self.temperature * evidence + self.marginal.log(), 1)
        return posterior.gather(1, y[:, None])[:, 0]

    def mixed(self, read: Tensor, y: Tensor) -> Tensor:
        """The same, mixed with the marginal: the reader's answer, in nats."""
        return torch.logaddexp(read + math.log1p(-self.mixture), self.marginal.log()[y] + math.log(self.mixture))


def _gains(
    x: Tensor, y: Tensor, alphabet: int, ids: Tensor, parts: list[Tensor], draw: torch.Generator
) -> tuple[Tensor, float]:
    """(bits gained by reading x, for every pair while it is held out; held-out entropy of the marginal in bits)."""
    gains = torch.empty(len(y), dtype=torch.double)
    surprise = torch.empty(len(y), dtype=torch.double)
    for held in parts:
        others = without(held, len(y))
        rows, target = standardised(x[others], x[others]), y[others]
        reader = _calibrated(rows, target, alphabet, ids[others], draw)
        evidence = reader.evidence(standardised(x[held], x[others]))
        surprise[held] = -reader.marginal.log()[y[held]]
        gains[held] = reader.mixed(reader.read(evidence, y[held]), y[held]) + surprise[held]
    return gains / math.log(2), surprise.mean().item() / math.log(2)


def _calibrated(x: Tensor, y: Tensor, alphabet: int, ids: Tensor, draw: torch.Generator) -> _Reader:
    """The reader learnt from all of x, with the settings that did best on a fifth of it when learnt from the rest."""
    held = folds(torch.unique(ids, return_inverse=True)[1], _CALIBRATION, draw)[0]
    others = without(held, len(y))
    best, choice = -math.inf, (_SHRINKAGE[0], 0.0, _MIXTURES[0])
    for shrinkage in _SHRINKAGE:
        reader = _Reader.fit(x[others], y[others], alphabet, shrinkage)
        evidence = reader.evidence(x[held])
        for temperature in _TEMPERATURES:
            read = replace(reader, temperature=temperature).read(evidence, y[held])
            for mixture in _MIXTURES:
                score = replace(reader, mixture=mixture).mixed(read, y[held]).mean().item()
                if score > best:
                    best, choice = score, (shrinkage, temperature, mixture)
    shrinkage, temperature, mixture = choice
    reader = _Reader.fit(x, y, alphabet, shrinkage)
    return replace(reader, temperature=temperature, mixture=mixture)
