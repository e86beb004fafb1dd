"""Exact samplers for the distributions of the protocol, fed by secret randomness only.

Ternary and uniform values come by rejection, the centred binomial by counting bits, the discrete Gaussian by rejection
from a uniform: its tail is cut at 10 σ (mass beyond it below 2^-74), and acceptance probabilities are multiples of
2^-53, so a value is within 2^-50 of its law in statistical distance. They are not written for constant time: local side
channels are outside the threat model.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from splitveil.lattice.compiled import compiled
from splitveil.lattice.randomness import secret_bytes, secret_words

TAIL = 10.0  # in standard deviations
MAX_DRAWS = 1 << 20  # at a time: the hint of a large layer takes millions, which need not be in memory together


@compiled("int64(uint8[::1], int8[::1], int64)")
def _ternary(source: NDArray[np.uint8], out: NDArray[np.int8], filled: int) -> int:
    # A byte below 243 = 3^5 holds five independent trits; the others are rejected.
    for byte in source:
        if byte < 243:
            value = np.int64(byte)
            for _ in range(5):
                if filled == len(out):
                    return filled
                out[filled] = value % 3 - 1
                value //= 3
                filled += 1
    return filled


@compiled("void(uint8[::1], int8[::1])")
def _binomial(source: NDArray[np.uint8], out: NDArray[np.int8]) -> None:
    # Half a byte is one value: two bits count for it, two against.
    for i in range(len(out)):
        half = source[i >> 1] >> np.uint8(4 * (i & 1))
        out[i] = np.int8((half & 1) + (half >> 1 & 1)) - np.int8((half >> 2 & 1) + (half >> 3 & 1))


@compiled("int64(uint8[::1], int16[::1], int64, int64, int64)")
def _uniform(source: NDArray[np.uint8], out: NDArray[np.int16], filled: int, bound: int, limit: int) -> int:
    width = 2 * bound + 1
    for i in range(0, len(source) - 1, 2):
        if filled == len(out):
            return filled
        value = np.int64(source[i]) | np.int64(source[i + 1]) << 8
        if value < limit:
            out[filled] = value % width - bound
            filled += 1
    return filled


@compiled("int64(uint64[::1], int64[::1], int64, float64, int64, uint64)")
def _gaussian(
    source: NDArray[np.uint64], out: NDArray[np.int64], filled: int, sigma: float, bound: int, mask: int
) -> int:
    for i in range(0, len(source) - 1, 2):
        if filled == len(out):
            return filled
        proposal = np.int64(source[i] & np.uint64(mask))
        if proposal > 2 * bound:
            continue
        value = proposal - bound
        accept = np.float64(source[i + 1] >> np.uint64(11)) * 2.0**-53
        scaled = np.float64(value) / sigma
        if accept < np.exp(-0.5 * scaled * scaled):
            out[filled] = value
            filled += 1
    return filled


def _fill(count: int, expected: float, step: Callable[[int, int], int]) -> None:
    """Calls ``step(draws, filled)`` until ``count`` values are there; ``expected`` draws make one value on average."""
    filled = 0
    while filled < count:
        draws = min(int((count - filled) * expected * 1.1) + 64, MAX_DRAWS)
        filled = step(draws, filled)


def ternary(count: int) -> NDArray[np.int8]:
    """``count`` independent values, uniform in {−1, 0, 1}."""
    out = np.empty(count, dtype=np.int8)
    _fill(count, 256 / 243 / 5, lambda draws, filled: _ternary(secret_bytes(draws), out, filled))
    return out


def centred_binomial_2(count: int) -> NDArray[np.int8]:
    """``count`` independent centred binomials with η = 2: values −2 … 2, variance 1."""
    out = np.empty(count, dtype=np.int8)
    _binomial(secret_bytes(-(-count // 2)), out)
    return out


def uniform(count: int, bound: int) -> NDArray[np.int16]:
    """``count`` independent values, uniform in [−bound, bound], 1 ≤ bound < 2^14."""
    width = 2 * bound + 1
    limit = 65536 // width * width
    out = np.empty(count, dtype=np.int16)
    _fill(count, 65536 / limit, lambda draws, filled: _uniform(secret_bytes(2 * draws), out, filled, bound, limit))
    return out


def discrete_gaussian(count: int, sigma: float) -> NDArray[np.int64]:
    """``count`` independent discrete Gaussians on ℤ, mass ∝ exp(−x²/2σ²), for 1 ≤ σ < 2^40."""
    if not 1.0 <= sigma < 2.0**40:
        raise ValueError(f"sigma = {sigma} is outside [1, 2^40)")
    bound = int(np.ceil(TAIL * sigma))
    mask = (1 << (2 * bound).bit_length()) - 1
    expected = (mask + 1) / (sigma * np.sqrt(2 * np.pi))
    out = np.empty(count, dtype=np.int64)
    _fill(count, expected, lambda draws, filled: _gaussian(secret_words(2 * draws), out, filled, sigma, bound, mask))
    return out
