"""Distributions whose mutual information is known in closed form, and samples of them."""

import math

import torch
from torch import Tensor


def correlated(bits: float, width: int, pairs: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Jointly Gaussian x and y, (pairs, width) each, of ``bits`` in all, equally many in every dimension.

    Both are mixed by a random matrix, which changes no mutual information.
    """
    draw = torch.Generator().manual_seed(seed)
    rho = math.sqrt(1 - 2 ** (-2 * bits / width))
    x, noise, a, b = (torch.randn(n, width, generator=draw) for n in (pairs, pairs, width, width))
    return x @ a, (rho * x + math.sqrt(1 - rho**2) * noise) @ b


def channel(symbols: int, error: float, width: int, pairs: int, seed: int = 1) -> tuple[Tensor, Tensor, float]:
    """(x (pairs, width), ids (pairs,), bits): a symmetric channel whose outputs are random points.

    With probability ``error`` another symbol than the id comes out, all others equally likely.
    """
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(symbols, (pairs,), generator=draw)
    wrong = torch.rand(pairs, generator=draw) < error
    out = torch.where(wrong, (ids + torch.randint(1, symbols, (pairs,), generator=draw)) % symbols, ids)
    doubt = -sum(p * math.log2(p / n) for p, n in ((error, symbols - 1), (1 - error, 1)) if p > 0)
    return torch.randn(symbols, width, generator=draw)[out], ids, math.log2(symbols) - doubt


def grouped(x: Tensor, y: Tensor, times: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every pair ``times`` times over, and the group that its copies form: no more is known than from one copy."""
    return (
        x.repeat_interleave(times, 0),
        y.repeat_interleave(times, 0),
        torch.arange(len(x)).repeat_interleave(times),
    )
