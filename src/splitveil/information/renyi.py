"""Matrix-based Rényi entropy: "information" from the eigenvalues of kernel matrices, without a density.

It is not Shannon's mutual information, and its size depends on the kernel, on its width and on the number of pairs:
with permuted pairs it is far from 0. With all of these fixed it orders representations of one width, which is all that
it claims.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from splitveil.errors import ConfigurationError
from splitveil.information.estimate import Claim, Estimate, refusal
from splitveil.information.pairs import checked, generator, permuted, standardised, student


@dataclass(frozen=True)
class MatrixRenyi:
    """S(A) + S(B) − S(A ∘ B) with S(A) = log2(Σ λᵢ^α) / (1 − α), over kernel matrices A, B of trace 1.

    Real vectors get a Gaussian kernel as wide as ``width`` × their median distance, so that scale does not matter; ids
    get 1 where they are equal and 0 elsewhere. Eigenvalues cost O(n³), so subsamples of ``sample`` pairs are taken.
    """

    alpha: float = 1.01
    """Order; near 1 it resembles Shannon's entropy."""
    width: float = 1.0
    sample: int = 400
    repeats: int = 4
    """Subsamples at most; they share no pair."""

    name: ClassVar[str] = "renyi"
    source: ClassVar[str] = "Sanchez Giraldo, Rao and Principe 2015"
    applies: ClassVar[str] = "comparing representations of one width, with equally many pairs; not a number of bits"

    def __post_init__(self) -> None:
        if self.alpha <= 0 or self.alpha == 1 or self.width <= 0 or self.sample < 2 or self.repeats < 2:
            raise ConfigurationError(
                "expected alpha > 0 and not 1, width > 0, at least two pairs a subsample and two subsamples; got "
                f"{self.alpha}, {self.width}, {self.sample}, {self.repeats}"
            )

    def estimate(self, x: Tensor, y: Tensor, *, seed: int = 0, groups: Tensor | None = None) -> Estimate:
        """See ``Estimator``. Interval: Student's, over the subsamples. Limit: log2 of a subsample's pairs."""
        x, y, _ = checked(x, y, groups)
        pairs = x.shape[0]
        count = min(self.repeats, pairs // self.sample)
        if count < 2:
            return refusal(self.name, pairs, f"{pairs} pairs; needs two subsamples of {self.sample}")
        draw = generator(seed)
        order = torch.randperm(pairs, generator=draw)
        values, floors = [], []
        x = standardised(x, x)
        y = standardised(y, y) if y.ndim == 2 else y
        for part in order[: count * self.sample].view(count, self.sample):
            of_x, of_y = self._kernel(x[part]), self._kernel(y[part])
            shuffled = permuted(torch.arange(self.sample), draw)
            alone = self._entropy(of_x) + self._entropy(of_y)
            values.append(alone - self._entropy(of_x * of_y * self.sample))
            floors.append(alone - self._entropy(of_x * of_y[shuffled][:, shuffled] * self.sample))
        bits = torch.tensor(values)
        low, high = student(bits, bits.std().item() / math.sqrt(count))
        floor = sum(floors) / count
        return Estimate(self.name, Claim.RELATIVE, bits.mean().item(), low, high, floor, pairs, math.log2(self.sample))

    def _kernel(self, rows: Tensor) -> Tensor:
        """(rows, rows), of trace 1."""
        if rows.ndim == 1:
            return (rows[:, None] == rows).double() / len(rows)
        distances = torch.cdist(rows, rows)
        apart = distances[distances > 0]
        scale = self.width * (apart.median().item() if len(apart) else 1.0)
        return torch.exp(-0.5 * (distances / scale).square()) / len(rows)

    def _entropy(self, kernel: Tensor) -> float:
        values = torch.linalg.eigvalsh(kernel).clamp(min=0)
        return math.log2(values.pow(self.alpha).sum().item()) / (1 - self.alpha)
