"""The three online loops: encode a row, answer a row, take off the mask. Wrap-around uint32 arithmetic throughout."""

import numpy as np
from numba import float32, float64, int32, uint32, uint64, void
from numpy.typing import NDArray

from splitveil.lattice.compiled import READ_ONLY_FLOATS, READ_ONLY_ROWS, compiled

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I8 = NDArray[np.int8]
I32 = NDArray[np.int32]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]


@compiled(float64(READ_ONLY_FLOATS, uint32[::1], uint32[::1], float64, uint64[::1]))
def encode_row(x: F32, mask: U32, out: U32, size: float, square: U64) -> float:
    """out = rint(x·size/‖x‖₂) + mask; returns size/‖x‖₂, 0 for x = 0, NaN if x is not finite.

    For x = 0 and for x not finite the query is the mask alone. ``square`` receives Σx̂² as (high, low) 32-bit halves,
    each summed in 64 bits.
    """
    width = len(x)
    square[0] = square[1] = 0
    # x is divided by its largest entry before it is squared: subnormal and huge inputs keep their precision. Magnitudes
    # are compared as bits, whose order is the same: a maximum of floats, with its rules for NaN, is not vectorised.
    bits = x.view(np.uint32)
    top = np.zeros(1, dtype=np.uint32)
    for i in range(width):
        top[0] = max(top[0], bits[i] & np.uint32(0x7FFFFFFF))
    finite = top[0] < np.uint32(0x7F800000)
    if top[0] == np.uint32(0) or not finite:
        for i in range(len(mask)):
            out[i] = mask[i]
        return 0.0 if finite else np.nan
    # Eight partial sums, so that the loop is not one chain of additions.
    inverse = 1.0 / np.float64(top.view(np.float32)[0])
    partial = np.zeros(8)
    whole = width - width % 8
    for i in range(0, whole, 8):
        for lane in range(8):
            z = np.float64(x[i + lane]) * inverse
            partial[lane] += z * z
    for i in range(whole, width):
        z = np.float64(x[i]) * inverse
        partial[0] += z * z
    factor = size * inverse / np.sqrt(partial.sum())
    high, low = np.uint64(0), np.uint64(0)
    for i in range(width):
        value = np.int64(np.rint(np.float64(x[i]) * factor))
        out[i] = np.uint32(value) + mask[i]
        s = np.uint64(value * value)
        high += s >> np.uint64(32)
        low += s & np.uint64(0xFFFFFFFF)
    for i in range(width, len(mask)):
        out[i] = mask[i]
    square[0], square[1] = high, low
    return float(factor)


@compiled(void(int32[:, ::1], READ_ONLY_ROWS, uint32[:, ::1]))
def answer_rows(secret: I32, queries: U32, out: U32) -> None:
    """out[i, j] += ⟨secret[j], queries[i]⟩ mod 2^32: the server's whole online work."""
    for i in range(queries.shape[0]):
        for j in range(secret.shape[0]):
            total = np.uint32(0)
            for k in range(queries.shape[1]):
                total += np.uint32(secret[j, k]) * queries[i, k]
            out[i, j] += total


@compiled("void(int32[:, ::1], uint32[:, ::1], uint32[:, ::1])")
def inner_products(secret: I32, hints: U32, out: U32) -> None:
    """out[i, j] = ⟨hints[j], secret[i]⟩ mod 2^32: what the client will subtract from the answers."""
    for i in range(secret.shape[0]):
        for j in range(hints.shape[0]):
            total = np.uint32(0)
            for k in range(secret.shape[1]):
                total += np.uint32(secret[i, k]) * hints[j, k]
            out[i, j] = total


@compiled(void(READ_ONLY_ROWS, uint32[:, ::1], float64[::1], float64[::1], float32[:, ::1]))
def unmask(answers: U32, corrections: U32, factors: F64, units: F64, out: F32) -> None:
    """out[i, j] = centred(answers − corrections)[i, j] · units[j] / factors[i], and 0 where factors[i] is 0."""
    for i in range(answers.shape[0]):
        inverse = 0.0 if factors[i] == 0.0 else 1.0 / factors[i]
        for j in range(answers.shape[1]):
            out[i, j] = np.float32(np.float64(np.int32(answers[i, j] - corrections[i, j])) * units[j] * inverse)
