"""The private linear layer in Python integers: slow, exact, and written to be read. An oracle for tests, nothing else.

Every function takes all its randomness as arguments and works for any ring degree and any number of inputs d. Vectors
are lists of integers; ring elements are lists of N coefficients, of Z_q[X]/(X^N + 1) with q = 2^32. The formulas are
those of the protocol design; what the fast code does in floating point or in machine words is done without rounding.

In short, for one row C of the core, its pad P and x̂ = rint(size·x/‖x‖):

    hint   = Σ_k ā_k·C_k + ā_pad·P(X^t) + f                       published
    query  = (x̂ + (a_k·s)_k + e ‖ (a_pad·s)_{multiples of t} + e_pad)   client → server
    answer = ⟨[C | P], query⟩ + g                                 server → client
    answer − ⟨hint, s⟩ = ⟨C, x̂ + e⟩ + ⟨P, e_pad⟩ + g − ⟨f, s⟩      what the client makes of it
"""

import hashlib
import math
from collections.abc import Sequence
from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext
from itertools import chain

Q = 2**32
Vector = list[int]
Matrix = list[Vector]

_EXACT = Context(prec=400, rounding=ROUND_HALF_EVEN)  # squares of all float32 numbers add up exactly in 400 digits


def centred(value: int) -> int:
    """The representative of ``value`` mod q in [−q/2, q/2)."""
    return (value + Q // 2) % Q - Q // 2


def dot(u: Sequence[int], v: Sequence[int]) -> int:
    """⟨u, v⟩ over the integers."""
    return sum(a * b for a, b in zip(u, v, strict=True))


def add(*vectors: Sequence[int]) -> Vector:
    """The sum of vectors, mod q."""
    return [sum(values) % Q for values in zip(*vectors, strict=True)]


def subtract(u: Sequence[int], v: Sequence[int]) -> Vector:
    """u − v mod q."""
    return [(a - b) % Q for a, b in zip(u, v, strict=True)]


def multiply(f: Sequence[int], g: Sequence[int]) -> Vector:
    """f·g in Z_q[X]/(X^N + 1), by the definition."""
    n = len(f)
    out = [0] * n
    for i, a in enumerate(f):
        for j, b in enumerate(g):
            if i + j < n:
                out[i + j] += a * b
            else:
                out[i + j - n] -= a * b
    return [value % Q for value in out]


def reflect(f: Sequence[int]) -> Vector:
    """f(X^-1), since X^-i = −X^(N−i)."""
    return [f[0] % Q] + [-f[len(f) - i] % Q for i in range(1, len(f))]


def spread(coefficients: Sequence[int], degree: int) -> Vector:
    """P(X^t) for a polynomial P of ``degree``/t coefficients."""
    out = [0] * degree
    out[:: degree // len(coefficients)] = coefficients
    return out


def blocks(row: Sequence[int], degree: int) -> Matrix:
    """A row of any length, cut into ring elements; the last one is filled up with zeros."""
    padded = [*row, *[0] * (-len(row) % degree)]
    return [padded[first : first + degree] for first in range(0, len(padded), degree)]


def public_message(publication: bytes, seed: bytes, width: int, index: int, degree: int) -> bytes:
    """What is hashed to make a public element: domain ‖ id ‖ d ‖ index ‖ N ‖ log₂ q ‖ seed, numbers in 4 bytes each."""
    numbers = [number.to_bytes(4, "little") for number in (width, index, degree, 32)]
    return b"".join([b"splitveil public randomness 1", publication, *numbers, seed])


def public_element(publication: bytes, seed: bytes, width: int, index: int, degree: int) -> Vector:
    """A public element: SHAKE256 of the message, read as little-endian 32-bit words."""
    stream = hashlib.shake_256(public_message(publication, seed, width, index, degree)).digest(4 * degree)
    return [int.from_bytes(stream[i : i + 4], "little") for i in range(0, len(stream), 4)]


def public_elements(publication: bytes, seed: bytes, width: int, degree: int) -> Matrix:
    """a_0 … a_{K−1} and, last, a_pad."""
    count = -(-width // degree) + 1
    return [public_element(publication, seed, width, index, degree) for index in range(count)]


def hint(core_row: Sequence[int], pad_row: Sequence[int], error: Sequence[int], a: Matrix, a_pad: Vector) -> Vector:
    """The hint of one row of the core."""
    degree = len(a_pad)
    parts = [multiply(reflect(a_k), block) for a_k, block in zip(a, blocks(core_row, degree), strict=True)]
    return add(*parts, multiply(reflect(a_pad), spread(pad_row, degree)), error)


def mask(
    a: Matrix, a_pad: Vector, secret: Sequence[int], error: Sequence[int], pad_error: Sequence[int]
) -> tuple[Vector, Vector]:
    """(what covers x, the pad's coordinates): (a_k·s)_k + e cut to d, and a_pad·s at multiples of t, + e_pad."""
    data = list(chain.from_iterable(multiply(a_k, secret) for a_k in a))[: len(error)]
    stride = len(secret) // len(pad_error)
    return add(data, error), add(multiply(a_pad, secret)[::stride], pad_error)


def query(encoded: Sequence[int], masks: tuple[Vector, Vector]) -> Vector:
    """x̂ + mask ‖ mask of the pad."""
    return add(encoded, masks[0]) + masks[1]


def answer(core_row: Sequence[int], pad_row: Sequence[int], sent: Sequence[int], noise: int) -> int:
    """What the server returns for one row of the core."""
    return (dot([*core_row, *pad_row], sent) + noise) % Q


def recovered(answered: int, hint_row: Sequence[int], secret: Sequence[int]) -> int:
    """What is left once the client has taken off the mask."""
    return centred(answered - dot(hint_row, secret))


def expected(
    core_row: Sequence[int],
    pad_row: Sequence[int],
    hint_error: Sequence[int],
    encoded: Sequence[int],
    secret: Sequence[int],
    error: Sequence[int],
    pad_error: Sequence[int],
    noise: int,
) -> int:
    """What ``recovered`` must be, over the integers: ⟨C, x̂ + e⟩ + ⟨P, e_pad⟩ + g − ⟨f, s⟩."""
    noisy = [u + v for u, v in zip(encoded, error, strict=True)]
    return dot(core_row, noisy) + dot(pad_row, pad_error) + noise - dot(hint_error, secret)


def norm_bound(core: Matrix) -> int:
    """ρ: the longest row's 2-norm, rounded up, and 1 at least."""
    square = max(dot(row, row) for row in core)
    root = math.isqrt(square)
    return max(1, root if root * root == square else root + 1)


def theta(width: int, rho: int, noise: float, degree: int, pad_width: int, pad_bound: int, sigmas: float) -> float:
    """θ, the share of q/2 that the signal may fill; ``sigmas`` is σ_f = the least σ_g."""
    pad_variance = pad_bound * (pad_bound + 1) / 3
    variance = rho**2 + pad_width * pad_variance + 2 / 3 * degree * sigmas**2 + sigmas**2
    lost = rho * math.sqrt(width) / 2 + 8 * math.sqrt(variance)
    return (1 - lost / (Q / 2)) / (1 + 8 * noise / math.sqrt(width))


def scaled(x: Sequence[float], size: float) -> list[Decimal]:
    """size·x/‖x‖ to hundreds of digits; zeros for x = 0."""
    with localcontext(_EXACT):
        exact = [Decimal(value) for value in x]
        norm = sum((value * value for value in exact), Decimal(0)).sqrt()
        return [Decimal(size) * value / norm if norm else Decimal(0) for value in exact]


def encode(x: Sequence[float], size: float) -> Vector:
    """x̂: ``scaled`` rounded to integers, ties to even."""
    with localcontext(_EXACT):
        return [int(value.to_integral_value()) for value in scaled(x, size)]
