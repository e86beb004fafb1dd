"""Can these bytes be told from noise? Two chi-square tests; a small p-value says yes."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

REJECT = 1e-6
"""Below this p-value the bytes are not noise. Noise is called so by mistake twice in a million."""


@dataclass(frozen=True)
class NoiseTest:
    """p-values of the two tests, and how many bytes were tested."""

    size: int
    bytes_p: float
    """All 256 byte values are equally frequent."""
    pairs_p: float
    """All 256 pairs of the leading half bytes of two neighbouring words are equally frequent."""

    @property
    def looks_like_noise(self) -> bool:
        """Whether neither test tells the bytes from noise."""
        return min(self.bytes_p, self.pairs_p) >= REJECT


def noise_test(words: NDArray[np.uint32]) -> NoiseTest:
    """Tests 32-bit words (any shape), at least a few thousand."""
    flat = np.ascontiguousarray(words.reshape(-1), dtype="<u4")
    leading = (flat >> np.uint32(28)).astype(np.int64)
    even = leading[: len(leading) // 2 * 2]
    return NoiseTest(
        flat.nbytes,
        _uniform_p(np.bincount(flat.view(np.uint8), minlength=256)),
        _uniform_p(np.bincount(16 * even[::2] + even[1::2], minlength=256)),
    )


def _uniform_p(counts: NDArray[np.int64]) -> float:
    """Probability that uniform counts deviate at least as much (upper tail of chi-square)."""
    expected = counts.sum() / len(counts)
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))
