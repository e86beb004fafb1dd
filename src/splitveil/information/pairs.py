"""Pairs (x, y): checked, divided into folds, permuted; and intervals over them."""

import math

import torch
from torch import Tensor

from splitveil.errors import ConfigurationError, NonFiniteError

RESAMPLES = 1000
# Two-sided 97.5 % points of Student's t by degrees of freedom; with more than 30 the normal point is near enough.
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)


def checked(x: Tensor, y: Tensor, groups: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(x float64, y, groups) on the CPU: y int64 (pairs,) if it holds ids, float64 (pairs, k) if it holds vectors.

    Raises ``ConfigurationError`` where shapes or dtypes do not fit, ``NonFiniteError`` for NaN or infinity.
    """
    if x.ndim != 2 or y.ndim not in (1, 2) or x.shape[0] != y.shape[0] or not x.numel() or not y.numel():
        raise ConfigurationError(
            "expected x (pairs, width) and y (pairs,) or (pairs, k), none empty; got "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    if not x.is_floating_point() or y.is_floating_point() != (y.ndim == 2):
        raise ConfigurationError(
            f"expected real x, and y of integer ids (pairs,) or real vectors (pairs, k); got {x.dtype} and "
            f"{y.dtype} {tuple(y.shape)}"
        )
    if groups is not None and groups.shape != (x.shape[0],):
        raise ConfigurationError(f"expected one group id a pair, ({x.shape[0]},), got {tuple(groups.shape)}")
    if not bool(torch.isfinite(x).all()) or not bool(torch.isfinite(y).all()):
        raise NonFiniteError("the pairs to be measured contain NaN or infinity; measure what was computed before it")
    x = x.detach().cpu().double()
    y = y.detach().cpu().double() if y.ndim == 2 else y.detach().cpu().long()
    ids = torch.arange(x.shape[0]) if groups is None else torch.unique(groups.cpu(), return_inverse=True)[1]
    return x, y, ids


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def permuted(y: Tensor, draw: torch.Generator) -> Tensor:
    """The same y in another order: pairs that know nothing of each other."""
    return y[torch.randperm(y.shape[0], generator=draw)]


def folds(groups: Tensor, count: int, draw: torch.Generator) -> list[Tensor]:
    """Index sets (…,) of ``count`` folds that divide no group; groups are consecutive ids from 0, as ``checked`` gives.

    Fewer folds where there are fewer groups.
    """
    number = int(groups.max()) + 1
    fold = torch.empty(number, dtype=torch.long)
    fold[torch.randperm(number, generator=draw)] = torch.arange(number) % count
    return [torch.nonzero(fold[groups] == k).flatten() for k in range(min(count, number))]


def without(held: Tensor, total: int) -> Tensor:
    """All indices below ``total`` that are not in ``held``."""
    keep = torch.ones(total, dtype=torch.bool)
    keep[held] = False
    return torch.nonzero(keep).flatten()


def bootstrap(values: Tensor, groups: Tensor, draw: torch.Generator) -> tuple[float, float]:
    """95 % percentile interval of the mean of ``values`` (pairs,), resampling whole groups."""
    ids = torch.unique(groups, return_inverse=True)[1]
    number = int(ids.max()) + 1
    sums = torch.zeros(number, dtype=torch.double).index_add_(0, ids, values.double())
    counts = torch.bincount(ids, minlength=number).double()
    picked = torch.randint(number, (RESAMPLES, number), generator=draw)
    means = sums[picked].sum(1) / counts[picked].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return low, high


def student(values: Tensor, error: float) -> tuple[float, float]:
    """95 % interval of the mean of a few ``values``, given its standard ``error``."""
    freedom = len(values) - 1
    point = _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else 1.96 + 2.5 / freedom
    mean = values.mean().item()
    return mean - point * error, mean + point * error


def standardised(x: Tensor, like: Tensor) -> Tensor:
    """``x`` with every feature centred and scaled by its mean and deviation in ``like``; constant ones become 0."""
    deviation = like.std(0)
    scale = torch.where(deviation > 1e-12 * deviation.max().clamp(min=math.ulp(0.0)), deviation, torch.inf)
    return (x - like.mean(0)) / scale
