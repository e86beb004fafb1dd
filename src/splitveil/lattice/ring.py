"""Products in R = Z_{2^32}[X]/(X^N + 1), exact, eight rows at a time.

One operand is public and fixed (its spectrum is kept), the other is small: a client's secret, a row of an integer
core, a pad. The product over ℤ is computed by floating-point FFTs and rounded; the fixed operand is cut into two
16-bit halves first, which is what makes the rounding provably right:

    A real polynomial mod X^N + 1 is a complex one mod X^M − i, M = N/2 (fold the upper half into the imaginary part),
    and, twisted by powers of ζ = exp(iπ/N), a cyclic one of length M. Let u = 2^-53. The tables below are correct to 4u
    (the FFT's twiddles) and 2u (the twist), so that in the 2-norm a radix-2 FFT of length M has relative error
    κ ≤ 10·log₂(M)·u (Higham, Accuracy and Stability of Numerical Algorithms, Theorem 24.2), a twist adds 5u and the
    product of two spectra 3u. For a half h (|h_i| ≤ 2^15) and a small operand g, a relative error ε in the spectrum of
    h or in the transform back moves the result by at most ε·‖h‖₂·‖g‖₁, one in the spectrum of g by at most
    ε·‖h‖₁·‖g‖₂: by ε·2^15·N·‖g‖₂ either way. There are three transforms, three twists and a product; with N = 2048,
    M = 1024 and ‖g‖₂ ≤ 2^17 that is at most (3·(100 + 5) + 3)·u·2^15·2^11·2^17 < 0.32 < 1/2.

``MAX_SMALL_NORM`` = 2^17 is therefore checked; everything the protocol multiplies is far below it. Eight rows are
transformed together, one in each lane of a vector register, so that every stage of the FFT is the same straight code.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from splitveil.lattice.compiled import compiled

LANES = 8
MAX_DEGREE = 2048
MAX_SMALL_NORM = 2.0**17

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class _Tables:
    """cos and sin of the FFT's twiddles (M/2 of them) and of the twist ζ^j (M of them)."""

    cos: F64
    sin: F64
    twist_cos: F64
    twist_sin: F64


@lru_cache(maxsize=16)
def _tables(degree: int) -> _Tables:
    size = degree // 2
    angle = -2.0 * np.pi * np.arange(size // 2) / size
    twist = np.pi * np.arange(size) / degree
    return _Tables(np.cos(angle), np.sin(angle), np.cos(twist), np.sin(twist))


@compiled("void(float64[:, ::1], float64[:, ::1], float64[::1], float64[::1])")
def _forward(re: F64, im: F64, cos: F64, sin: F64) -> None:
    # Decimation in frequency: natural order in, bit-reversed order out. The inverse undoes the order, so nothing sorts.
    size = re.shape[0]
    half = size // 2
    stride = 1
    while half >= 1:
        for start in range(0, size, 2 * half):
            for j in range(half):
                wr, wi = cos[j * stride], sin[j * stride]
                p, q = start + j, start + j + half
                for lane in range(8):
                    ar, ai, br, bi = re[p, lane], im[p, lane], re[q, lane], im[q, lane]
                    re[p, lane] = ar + br
                    im[p, lane] = ai + bi
                    dr, di = ar - br, ai - bi
                    re[q, lane] = dr * wr - di * wi
                    im[q, lane] = dr * wi + di * wr
        half //= 2
        stride *= 2


@compiled("void(float64[:, ::1], float64[:, ::1], float64[::1], float64[::1])")
def _inverse(re: F64, im: F64, cos: F64, sin: F64) -> None:
    # Decimation in time with conjugated twiddles: bit-reversed order in, natural order out, not scaled.
    size = re.shape[0]
    half = 1
    stride = size // 2
    while half < size:
        for start in range(0, size, 2 * half):
            for j in range(half):
                wr, wi = cos[j * stride], -sin[j * stride]
                p, q = start + j, start + j + half
                for lane in range(8):
                    br, bi = re[q, lane], im[q, lane]
                    tr, ti = br * wr - bi * wi, br * wi + bi * wr
                    ar, ai = re[p, lane], im[p, lane]
                    re[p, lane] = ar + tr
                    im[p, lane] = ai + ti
                    re[q, lane] = ar - tr
                    im[q, lane] = ai - ti
        half *= 2
        stride //= 2


@compiled(
    "void(int32[:, ::1], float64[:, ::1], float64[:, ::1], float64[::1], float64[::1], float64[::1], float64[::1])"
)
def _load(small: NDArray[np.int32], re: F64, im: F64, tc: F64, ts: F64, cos: F64, sin: F64) -> None:
    """Folds, twists and transforms up to eight rows; missing rows are zeros."""
    size = re.shape[0]
    for j in range(size):
        for lane in range(8):
            re[j, lane] = 0.0
            im[j, lane] = 0.0
    for lane in range(small.shape[0]):
        for j in range(size):
            a, b = np.float64(small[lane, j]), np.float64(small[lane, j + size])
            re[j, lane] = a * tc[j] - b * ts[j]
            im[j, lane] = a * ts[j] + b * tc[j]
    _forward(re, im, cos, sin)


@compiled(
    "void(float64[:, ::1], float64[:, ::1], float64[:, ::1], float64[:, ::1],"
    " float64[::1], float64[::1], float64[::1], float64[::1], uint32[:, ::1])"
)
def _multiply_add(
    fixed_re: F64,
    fixed_im: F64,
    re: F64,
    im: F64,
    tc: F64,
    ts: F64,
    cos: F64,
    sin: F64,
    out: NDArray[np.uint32],
) -> None:
    """Adds fixed·small to ``out``; ``fixed_re[h]`` is the spectrum of the low (h = 0) and the high half (h = 1)."""
    size = re.shape[0]
    wr, wi = np.empty((size, 8)), np.empty((size, 8))
    scale = 1.0 / size
    for half in range(2):
        for j in range(size):
            fr, fi = fixed_re[half, j], fixed_im[half, j]
            for lane in range(8):
                a, b = re[j, lane], im[j, lane]
                wr[j, lane] = fr * a - fi * b
                wi[j, lane] = fr * b + fi * a
        _inverse(wr, wi, cos, sin)
        shift = np.uint32(16 * half)
        for lane in range(out.shape[0]):
            for j in range(size):
                a, b = wr[j, lane] * scale, wi[j, lane] * scale
                low = np.int64(np.rint(a * tc[j] + b * ts[j]))
                high = np.int64(np.rint(b * tc[j] - a * ts[j]))
                out[lane, j] += np.uint32(low) << shift
                out[lane, j + size] += np.uint32(high) << shift


@dataclass(frozen=True)
class FixedElement:
    """The spectrum of a public ring element: two halves of 16 bits, each (2, N/2) real and imaginary parts."""

    degree: int
    real: F64
    imaginary: F64

    @classmethod
    def of(cls, element: NDArray[np.uint32]) -> "FixedElement":
        """Prepares ``element`` (uint32, shape (N,), N a power of two from 4 to 2048) for many products."""
        degree = len(element)
        if degree < 4 or degree > MAX_DEGREE or degree & (degree - 1):
            raise ValueError(f"ring degree {degree} is not a power of two from 4 to {MAX_DEGREE}")
        low = (element & np.uint32(0xFFFF)).astype(np.int64)
        low = np.where(low >= 1 << 15, low - (1 << 16), low)
        # What is left is a multiple of 2^16; as a signed 16-bit number it stands for the same residue mod 2^32.
        high = (element.astype(np.int64) - low) >> 16
        high = np.where(high >= 1 << 15, high - (1 << 16), high)
        real, imaginary = np.empty((2, degree // 2)), np.empty((2, degree // 2))
        for half, values in enumerate((low, high)):
            transformed = Transformed.of(values.astype(np.int32)[None])
            real[half], imaginary[half] = transformed.re[:, 0], transformed.im[:, 0]
        return cls(degree, real, imaginary)


@dataclass(frozen=True)
class Transformed:
    """Up to eight small rows, transformed: (N/2, 8) real and imaginary parts, and how many rows are real.

    The rows are mostly secret, hence absent from ``repr``.
    """

    rows: int
    re: F64 = field(repr=False)
    im: F64 = field(repr=False)

    @classmethod
    def of(cls, small: NDArray[np.int32]) -> "Transformed":
        """Transforms ``small`` (int32, shape (rows ≤ 8, N)); the norm limit is the caller's to check once."""
        rows, degree = small.shape
        if rows > LANES:
            raise ValueError(f"{rows} rows, at most {LANES} are transformed together")
        t = _tables(degree)
        re, im = np.empty((degree // 2, LANES)), np.empty((degree // 2, LANES))
        _load(np.ascontiguousarray(small), re, im, t.twist_cos, t.twist_sin, t.cos, t.sin)
        return cls(rows, re, im)


def check_small(small: NDArray[np.int32]) -> None:
    """Raises ``ValueError`` if a row of ``small`` is too long for an exact product (‖row‖₂ > 2^17)."""
    norm = float(np.sqrt((small.astype(np.float64) ** 2).sum(axis=-1).max(initial=0.0)))
    if norm > MAX_SMALL_NORM:
        raise ValueError(f"operand of norm {norm:.3g} is too long for an exact product, at most {MAX_SMALL_NORM:.3g}")


def multiply_add(fixed: FixedElement, small: Transformed, out: NDArray[np.uint32]) -> None:
    """``out += fixed·small`` in R, for ``out`` of shape (small.rows, N)."""
    # The kernel does not check its indices.
    if 2 * len(small.re) != fixed.degree or out.shape != (small.rows, fixed.degree):
        raise ValueError(
            f"an element of degree {fixed.degree}, {small.rows} rows of degree {2 * len(small.re)} and a result of "
            f"shape {out.shape} do not fit"
        )
    t = _tables(fixed.degree)
    _multiply_add(fixed.real, fixed.imaginary, small.re, small.im, t.twist_cos, t.twist_sin, t.cos, t.sin, out)


def multiply(fixed: FixedElement, small: NDArray[np.int32]) -> NDArray[np.uint32]:
    """fixed·small in R for every row of ``small`` (int32, shape (rows, N)): uint32 of the same shape.

    Raises ``ValueError`` if a row's 2-norm exceeds ``MAX_SMALL_NORM``.
    """
    check_small(small)
    out = np.zeros(small.shape, dtype=np.uint32)
    for first in range(0, len(small), LANES):
        multiply_add(fixed, Transformed.of(small[first : first + LANES]), out[first : first + LANES])
    return out


def reflect(element: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """element(X^-1): coefficient 0 stays, coefficient i becomes minus coefficient N − i."""
    return np.concatenate([element[:1], np.uint32(0) - element[:0:-1]])
