"""What an estimator of mutual information returns, and what every estimator is."""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Protocol

from torch import Tensor


class Claim(StrEnum):
    """How the number of an ``Estimate`` relates to the mutual information; the value is how reports name it."""

    VALUE = "estimate"
    AT_LEAST = "at least"
    AT_MOST = "at most"
    RELATIVE = "relative measure"
    """Not mutual information: orders representations by it, measured with equally many pairs, and no more."""
    REFUSED = "refused"


@dataclass(frozen=True)
class Estimate:
    """Bits of information that x carries about y, per pair, from one estimator."""

    name: str
    claim: Claim
    bits: float
    """NaN where refused. May be slightly negative: nothing is clipped."""
    low: float
    high: float
    """95 % interval for what drawing other pairs would change; it does not cover the estimator's own bias."""
    floor: float
    """The same estimator on permuted pairs, where the truth is 0. NaN where permuting says nothing."""
    pairs: int
    """Pairs that were given."""
    limit: float
    """The most that the estimator could report from these pairs, in bits; NaN where there is no such limit."""
    reason: str = ""
    """Why it was refused, or why a bound may be far from the truth; empty otherwise."""
    unit: str = "bits"

    @property
    def refused(self) -> bool:
        return self.claim is Claim.REFUSED

    @property
    def excess(self) -> float:
        """``bits`` − ``floor``: what an estimator with a bias, such as the matrix-based one, is compared by."""
        return self.bits - self.floor


class Estimator(Protocol):
    """One estimator with its settings. A new one is a file with a class like this."""

    name: ClassVar[str]
    source: ClassVar[str]
    """Where it was published."""
    applies: ClassVar[str]
    """When its figure may be believed, in one sentence for the report."""

    def estimate(self, x: Tensor, y: Tensor, *, seed: int = 0, groups: Tensor | None = None) -> Estimate:
        """Bits that ``x`` (pairs, width) carries about ``y``: (pairs,) integer ids, or (pairs, k) real vectors.

        ``groups`` (pairs,) says which pairs are from one text. They depend on each other, so no group is divided
        between learning and testing, and intervals draw whole groups. Without it, pairs are independent.

        Raises ``ConfigurationError`` for shapes that do not fit, ``NonFiniteError`` for NaN or infinity in them.
        What is well-formed but outside of what the estimator applies to gives a refusal, with its reason.
        """


def refusal(name: str, pairs: int, reason: str) -> Estimate:
    """The answer of an estimator that does not apply."""
    nan = math.nan
    return Estimate(name, Claim.REFUSED, nan, nan, nan, nan, pairs, nan, reason)
