"""The four online loops against exact integers: wrap-around, extreme inputs, rows at the limit. None holds the GIL."""

import importlib
import math
import pkgutil
from fractions import Fraction

import numpy as np
import pytest
import reference
from numba.core.dispatcher import Dispatcher
from numpy.typing import NDArray

import splitveil.lattice
import splitveil.private
from splitveil.private.kernels import answer_rows, encode_row, inner_products, unmask

SIZE = 2.0**31 * 0.99 / 30_000
TINY, HUGE = float(np.finfo(np.float32).smallest_subnormal), float(np.finfo(np.float32).max)


def encode(x: NDArray[np.float32], mask: NDArray[np.uint32], size: float) -> tuple[NDArray[np.uint32], float, int]:
    """(query row, factor, Σx̂²)."""
    out, square = np.full(len(mask), 0xABABABAB, dtype=np.uint32), np.full(2, 99, dtype=np.uint64)
    factor = encode_row(x, mask, out, size, square)
    return out, factor, (int(square[0]) << 32) + int(square[1])


def rows(width: int) -> dict[str, NDArray[np.float32]]:
    """Inputs of every kind that a model, or somebody who wants to break it, can send."""
    rng = np.random.default_rng(width)
    normal = rng.standard_normal(width)
    one = np.eye(1, width, width // 2)[0]
    made = {
        "normal": normal,
        "outliers": normal * np.where(np.arange(width) % 50 == 3, 1000, 1),
        "one hot": one,
        "minus one hot": -3.7 * one,
        "constant": np.full(width, -0.3),
        "signs": np.sign(normal),
        "huge": normal / np.abs(normal).max() * 1e38,
        "largest": np.full(width, HUGE),
        "subnormal": np.full(width, TINY) * rng.integers(-9, 10, width) + TINY * one,
        "smallest": TINY * one,
        "huge and subnormal": np.where(np.arange(width) % 2, HUGE, TINY),
        "minus zeros": np.where(one == 1, 2.5, -0.0),
    }
    return {name: row.astype(np.float32) for name, row in made.items()}


@pytest.mark.parametrize("size", [SIZE, 2.0**31 * 0.999, 1.0], ids=["typical", "largest", "smallest"])
@pytest.mark.parametrize("width", [1, 7, 8, 9, 192])
def test_encoding_equals_exact_arithmetic(width: int, size: float) -> None:
    rng = np.random.default_rng(1)
    for name, x in rows(width).items():
        mask = rng.integers(0, 2**32, width + 5, dtype=np.uint32)
        out, factor, square = encode(x, mask, size)
        encoded = [
            reference.centred(value) for value in reference.subtract(out[:width].tolist(), mask[:width].tolist())
        ]
        for got, exact in zip(encoded, reference.scaled(x.tolist(), size), strict=True):
            # Half a unit, and a few roundings in double precision of a number below 2^31.
            assert abs(got - Fraction(exact)) <= Fraction(1, 2) + Fraction(1, 10**5), name
        assert square == reference.dot(encoded, encoded), name
        assert (out[width:] == mask[width:]).all(), name
        norm = math.sqrt(sum(Fraction(value) ** 2 for value in x.tolist()))
        assert factor == pytest.approx(size / norm, rel=1e-12), name


def test_encoding_does_not_depend_on_the_scale_of_x() -> None:
    x = rows(100)["normal"]
    mask = np.zeros(100, dtype=np.uint32)
    reference_row, factor, _ = encode(x, mask, SIZE)
    for power in (-100, -20, 3, 120):
        scaled = np.ldexp(x, power)
        out, other, _ = encode(scaled, mask, SIZE)
        assert (out == reference_row).all()
        assert other == factor * 2.0**-power


@pytest.mark.parametrize("x", [np.zeros(9), np.full(9, -0.0)])
def test_zero_sends_the_mask_alone(x: NDArray[np.float64]) -> None:
    mask = np.arange(14, dtype=np.uint32)
    out, factor, square = encode(x.astype(np.float32), mask, SIZE)
    assert (out == mask).all()
    assert factor == 0.0
    assert square == 0


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 3, 8])
def test_a_row_that_is_not_finite_sends_the_mask_alone(poison: float, place: int) -> None:
    x = rows(9)["normal"]
    x[place] = poison
    mask = np.arange(14, dtype=np.uint32)
    out, factor, square = encode(x, mask, SIZE)
    assert (out == mask).all()
    assert math.isnan(factor)
    assert square == 0


def test_locked_inputs_are_read_where_they_are() -> None:
    x = rows(9)["normal"]
    x.flags.writeable = False
    mask = np.zeros(9, dtype=np.uint32)
    assert encode(x, mask, SIZE)[1] == encode(x.copy(), mask, SIZE)[1]


EXTREME_WORDS = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 0x80008000]
EXTREME_INTS = [0, 1, -1, 2**17, -(2**17), 2**31 - 1, -(2**31)]


@pytest.mark.parametrize("width", [1, 3, 8, 33, 1216])
def test_answers_and_corrections_wrap_as_big_integers_do(width: int) -> None:
    rng = np.random.default_rng(width)
    for extreme in (False, True):
        secret = rng.choice(EXTREME_INTS, (4, width)) if extreme else rng.integers(-(2**17), 2**17, (4, width))
        words = rng.choice(EXTREME_WORDS, (3, width)) if extreme else rng.integers(0, 2**32, (3, width))
        secret, words = secret.astype(np.int32), words.astype(np.uint32)
        noise = rng.integers(0, 2**32, (3, 4), dtype=np.uint32)
        expected = [[reference.dot(s, w) for s in secret.tolist()] for w in words.tolist()]
        out = noise.copy()
        answer_rows(secret, np.frombuffer(words.tobytes(), dtype=np.uint32).reshape(3, width), out)
        assert out.tolist() == [reference.add(u, v) for u, v in zip(noise.tolist(), expected, strict=True)]
        corrections = np.full((4, 3), 7, dtype=np.uint32)
        inner_products(secret, words, corrections)
        assert corrections.T.tolist() == [[value % reference.Q for value in row] for row in expected]


def test_answers_at_the_largest_values() -> None:
    secret = np.full((1, 4096), -(2**31), dtype=np.int32)
    words = np.full((1, 4096), 2**32 - 1, dtype=np.uint32)
    out = np.full((1, 1), 2**32 - 1, dtype=np.uint32)
    answer_rows(secret, words, out)
    assert out[0, 0] == (4096 * 2**31 * 1 - 1) % reference.Q


def test_unmasking_centres_scales_and_skips_zero_rows() -> None:
    rng = np.random.default_rng(4)
    values = np.array([[0, 1, -1], [2**31 - 1, -(2**31), 5], [77, -78, 79], [3, 4, 5]], dtype=np.int64)
    corrections = rng.integers(0, 2**32, (4, 3), dtype=np.uint32)
    answers = ((values + corrections) % reference.Q).astype(np.uint32)
    factors, units = np.array([0.5, 3e5, 1e44, 0.0]), np.array([1e-4, 2.0, 1e30])
    out = np.full((4, 3), np.nan, dtype=np.float32)
    unmask(answers, corrections, factors, units, out)
    for i in range(3):
        for j in range(3):
            exact = Fraction(int(values[i, j])) * Fraction(units[j]) / Fraction(factors[i])
            assert out[i, j] == pytest.approx(float(exact), rel=1e-7)
    assert (out[3] == 0).all()


def kernels() -> dict[str, Dispatcher]:
    """Everything that numba compiled in ``lattice`` and ``private``, by its full name."""
    found = {}
    for package in (splitveil.lattice, splitveil.private):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            for value in vars(importlib.import_module(module.name)).values():
                if isinstance(value, Dispatcher):
                    found[f"{value.py_func.__module__}.{value.py_func.__name__}"] = value
    return found


def test_every_kernel_lets_other_threads_run() -> None:
    """A server answers several clients at once, and a client makes masks while its model computes."""
    assert len(kernels()) >= 12
    assert [name for name, kernel in kernels().items() if not kernel.targetoptions.get("nogil")] == []
