"""Where numbers stand in the slots of a CKKS ciphertext, and plaintexts that are exact to the last bit.

Matrices enter as generalised diagonals (Halevi, Shoup, CRYPTO 2014; short and wide ones: GAZELLE, USENIX Security
2018). A product of r rows takes one plaintext a diagonal and one rotation a diagonal or less.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splitveil.errors import ConfigurationError

C128 = NDArray[np.complex128]


def power_of_two(least: int) -> int:
    """The smallest power of two that is not below ``least``, which is at least 1."""
    return 1 << (least - 1).bit_length()


def baby_steps(diagonals: int) -> int:
    """How many of a power of two of diagonals share a giant step: about the square root."""
    return 1 << (diagonals.bit_length() // 2)


def diagonal(matrix: NDArray[Any], index: int, slots: int) -> NDArray[Any]:
    """``matrix[i, i + index]`` for every slot i, rows and columns repeating through the slots: (slots,)."""
    slot = np.arange(slots)
    picked: NDArray[Any] = matrix[slot % matrix.shape[0], (slot + index) % matrix.shape[1]]
    return picked


def stepped(matrix: NDArray[Any], slots: int, count: int) -> Iterator[tuple[int, int, NDArray[Any]]]:
    """(giant step, baby step, diagonal) for the first ``count`` diagonals, a power of two, in the order of evaluation.

    A diagonal is turned back by its giant step, which is applied to the sum of the baby steps' products.
    """
    babies = min(baby_steps(count), count)
    for giant in range(0, count, babies):
        for baby in range(babies):
            yield giant, baby, np.roll(diagonal(matrix, giant + baby, slots), giant)


def columns(matrix: NDArray[Any], index: int) -> NDArray[Any]:
    """``matrix[(c − index) mod r, c]`` for every column c: what to multiply by before rotating by ``index``."""
    column = np.arange(matrix.shape[1])
    picked: NDArray[Any] = matrix[(column - index) % matrix.shape[0], column]
    return picked


@cache
def _roots(degree: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """(place of each slot's root among the odd powers of ζ, ζ^-j for each coefficient j), ζ = exp(iπ/N)."""
    powers = np.empty(degree // 2, dtype=np.int64)
    power = 1
    for slot in range(degree // 2):
        powers[slot] = power
        power = power * 3 % (2 * degree)
    angle = np.arange(degree, dtype=np.longdouble) * (np.arctan(np.longdouble(1)) * 4 / degree)
    return (powers - 1) // 2, np.cos(angle) - 1j * np.sin(angle)


def coefficients(slots: C128, bits: int) -> NDArray[np.int64]:
    """The integer polynomial, (2 · slots,), nearest to one with these slots at scale 2^bits; below 2^63 in size.

    SEAL encodes with a transform in double precision, whose errors would fill the unused slots of B's plaintexts at
    2^-52. Raises ``ConfigurationError`` where the platform's long double is no more than a double.
    """
    if np.finfo(np.longdouble).nmant < 63:
        raise ConfigurationError(
            "the sealed engine's server needs a platform whose long double has 64 bits of mantissa (x86-64, or Linux "
            "on ARM); serve from one of those, or use the lattice engine"
        )
    degree = 2 * len(slots)
    place, turn = _roots(degree)
    values = np.zeros(degree, dtype=np.clongdouble)
    values[place] = slots
    values[degree - 1 - place] = slots.conj()
    exact = (np.fft.fft(values) * turn).real * (np.longdouble(2) ** bits / degree)
    return np.asarray(np.rint(exact), dtype=np.int64)


def small_slots(polynomial: NDArray[np.int64]) -> C128:
    """The slots, (N/2,), of an integer polynomial (N,) with coefficients below 2^32."""
    place, turn = _roots(len(polynomial))
    values = np.fft.ifft(polynomial * turn.conj().astype(np.complex128)) * len(polynomial)
    return np.asarray(values[place], dtype=np.complex128)
