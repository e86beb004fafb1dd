"""Ring products, against big integers and against FLINT; and the rounding error that the module's docstring bounds."""

import math
from typing import Any

import flint
import numpy as np
import pytest
import reference
from numpy.typing import NDArray

from splitveil.lattice import ring
from splitveil.lattice.ring import MAX_SMALL_NORM, FixedElement, Transformed, multiply, multiply_add, reflect

U32 = NDArray[np.uint32]
I32 = NDArray[np.int32]
DEGREES = [4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]
EXTREMES = [0x7FFF7FFF, 0x80008000, 0xFFFFFFFF, 1 << 31, 0x7FFF8000, 0x80007FFF]
LIMIT = int(MAX_SMALL_NORM)


def flint_multiply(fixed: U32, small: I32) -> list[int]:
    """fixed·small mod X^N + 1 and mod 2^32, by FLINT's integer polynomials."""
    degree = len(fixed)
    product = flint.fmpz_poly(fixed.tolist()) * flint.fmpz_poly(small.tolist())
    coefficients = [int(product[i]) for i in range(2 * degree)]
    return [(low - high) % reference.Q for low, high in zip(coefficients[:degree], coefficients[degree:], strict=True)]


def random_element(rng: np.random.Generator, degree: int) -> U32:
    return rng.integers(0, 2**32, degree, dtype=np.uint32)


def at_the_limit(rng: np.random.Generator, degree: int) -> I32:
    """Rows of 2-norm 2^17, or as near as integers come: one entry, two, spread with equal and with random signs."""
    even = int(LIMIT / math.sqrt(degree))
    rows = np.zeros((7, degree), dtype=np.int32)
    rows[0, 0], rows[1, -1], rows[2, degree // 2] = LIMIT, -LIMIT, LIMIT
    rows[3, ::3][:2] = int(LIMIT / math.sqrt(2))
    rows[4] = even
    rows[5] = even * rng.choice([-1, 1], degree)
    rows[6] = even * (-1) ** np.arange(degree)
    return rows


@pytest.mark.parametrize("degree", [4, 8, 16, 32, 64, 128])
def test_products_equal_the_big_integer_reference(degree: int) -> None:
    rng = np.random.default_rng(degree)
    fixed = random_element(rng, degree)
    small = rng.integers(-700, 701, (3, degree)).astype(np.int32)
    got = multiply(FixedElement.of(fixed), small)
    assert got.tolist() == [reference.multiply(fixed.tolist(), row) for row in small.tolist()]


@pytest.mark.parametrize("degree", DEGREES)
def test_products_equal_flint(degree: int) -> None:
    rng = np.random.default_rng(degree)
    fixed = random_element(rng, degree)
    # Eleven rows: one whole batch of eight lanes and a part of another.
    small = rng.integers(-2000, 2001, (11, degree)).astype(np.int32)
    assert multiply(FixedElement.of(fixed), small).tolist() == [flint_multiply(fixed, row) for row in small]


@pytest.mark.parametrize("degree", DEGREES)
def test_the_worst_operands_are_exact(degree: int) -> None:
    rng = np.random.default_rng(degree)
    small = at_the_limit(rng, degree)
    ring.check_small(small)
    for value in EXTREMES:
        fixed = np.full(degree, value, dtype=np.uint32)
        assert multiply(FixedElement.of(fixed), small).tolist() == [flint_multiply(fixed, row) for row in small]


def test_flint_and_the_reference_agree_at_full_degree() -> None:
    rng = np.random.default_rng(0)
    fixed, small = random_element(rng, 2048), np.zeros(2048, dtype=np.int32)
    small[rng.choice(2048, 40)] = rng.integers(-9000, 9000, 40)
    sparse: list[int] = [0] * 2048
    for shift in np.flatnonzero(small).tolist():
        turned = fixed.tolist()[2048 - shift :], fixed.tolist()[: 2048 - shift]
        shifted = [-v for v in turned[0]] + turned[1]
        sparse = reference.add(sparse, [int(small[shift]) * v for v in shifted])
    assert multiply(FixedElement.of(fixed), small[None])[0].tolist() == sparse == flint_multiply(fixed, small)


def test_multiply_add_adds_to_what_is_there() -> None:
    rng = np.random.default_rng(1)
    fixed = random_element(rng, 64)
    small = rng.integers(-9, 10, (5, 64)).astype(np.int32)
    start = rng.integers(0, 2**32, (5, 64), dtype=np.uint32)
    out = start.copy()
    multiply_add(FixedElement.of(fixed), Transformed.of(small), out)
    assert (out == start + multiply(FixedElement.of(fixed), small)).all()


@pytest.mark.parametrize("degree", DEGREES)
def test_reflect(degree: int) -> None:
    rng = np.random.default_rng(degree)
    element = random_element(rng, degree)
    assert reflect(element).tolist() == reference.reflect(element.tolist())
    assert (reflect(reflect(element)) == element).all()


def test_reflect_turns_a_product_into_inner_products() -> None:
    """What the hint rests on: ⟨ā·c, s⟩ = ⟨c, a·s⟩."""
    rng = np.random.default_rng(2)
    a = random_element(rng, 256)
    c, s = rng.integers(-900, 900, (2, 256)).astype(np.int32)
    left = int((multiply(FixedElement.of(reflect(a)), c[None])[0].astype(object) * s.astype(object)).sum())
    right = int((multiply(FixedElement.of(a), s[None])[0].astype(object) * c.astype(object)).sum())
    assert left % reference.Q == right % reference.Q


@pytest.mark.parametrize("degree", [4, 64, 2048])
def test_operands_past_the_limit_are_refused(degree: int) -> None:
    fixed = FixedElement.of(np.ones(degree, dtype=np.uint32))
    small = np.zeros((3, degree), dtype=np.int32)
    small[1, 1] = LIMIT
    multiply(fixed, small)
    small[1, 0] = 1
    with pytest.raises(ValueError, match="too long for an exact product"):
        multiply(fixed, small)
    small[1] = -(2**31)
    with pytest.raises(ValueError, match="too long for an exact product"):
        multiply(fixed, small)


@pytest.mark.parametrize("degree", [0, 1, 2, 3, 6, 100, 4096])
def test_other_degrees_are_refused(degree: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        FixedElement.of(np.ones(degree, dtype=np.uint32))


def test_shapes_that_do_not_fit_are_refused() -> None:
    """The kernels do not check indices, so this must happen before them."""
    fixed = FixedElement.of(np.ones(64, dtype=np.uint32))
    with pytest.raises(ValueError, match="do not fit"):
        multiply(fixed, np.ones((1, 128), dtype=np.int32))
    with pytest.raises(ValueError, match="do not fit"):
        multiply_add(fixed, Transformed.of(np.ones((2, 64), dtype=np.int32)), np.zeros((3, 64), dtype=np.uint32))
    with pytest.raises(ValueError, match="at most 8"):
        Transformed.of(np.ones((9, 64), dtype=np.int32))


def test_no_rows() -> None:
    assert multiply(FixedElement.of(np.ones(64, dtype=np.uint32)), np.zeros((0, 64), dtype=np.int32)).shape == (0, 64)


# The rounding error. The docstring's argument needs accurate tables, and promises less than 0.32.


def test_the_limit_keeps_the_error_bound_below_one_half() -> None:
    """The arithmetic of the docstring: three transforms, three twists, a product."""
    degree, u = ring.MAX_DEGREE, 2.0**-53
    relative = (3 * (10 * math.log2(degree / 2) + 5) + 3) * u
    assert relative * 2**15 * degree * MAX_SMALL_NORM < 0.32


@pytest.mark.parametrize("degree", DEGREES)
def test_the_tables_are_as_accurate_as_the_error_bound_assumes(degree: int) -> None:
    tables = ring._tables(degree)
    u = 2.0**-53
    assert worst_error(tables.cos, tables.sin, turn=-2, parts=degree // 2) <= 4 * u
    assert worst_error(tables.twist_cos, tables.twist_sin, turn=1, parts=degree) <= 2 * u


def worst_error(cos: Any, sin: Any, turn: int, parts: int) -> float:
    """max_k |cos_k + i·sin_k − exp(iπ·turn·k/parts)|, by FLINT's ball arithmetic."""
    worst = 0.0
    with flint.ctx.workprec(200):
        for k, (c, s) in enumerate(zip(cos.tolist(), sin.tolist(), strict=True)):
            sine, cosine = flint.arb(flint.fmpq(turn * k, parts)).sin_cos_pi()
            worst = max(worst, math.hypot(float(flint.arb(c) - cosine), float(flint.arb(s) - sine)))
    return worst


def unrounded(half: NDArray[np.int64], small: I32) -> NDArray[np.float64]:
    """What the kernel rounds, for one 16-bit half: the same butterflies in the same order, by numpy."""
    degree, size = len(half), len(half) // 2
    tables = ring._tables(degree)
    twiddles, twist = tables.cos + 1j * tables.sin, tables.twist_cos + 1j * tables.twist_sin

    def forward(values: NDArray[Any]) -> NDArray[np.complex128]:
        out = (values[:size] + 1j * values[size:]) * twist
        width = size // 2
        while width >= 1:
            pairs = out.reshape(-1, 2, width)
            turned = (pairs[:, 0] - pairs[:, 1]) * twiddles[:: size // 2 // width]
            out = np.stack([pairs[:, 0] + pairs[:, 1], turned], axis=1).reshape(-1)
            width //= 2
        return out

    product = forward(half) * forward(small)
    width = 1
    while width < size:
        pairs = product.reshape(-1, 2, width)
        turned = pairs[:, 1] * twiddles[:: size // 2 // width].conj()
        product = np.stack([pairs[:, 0] + turned, pairs[:, 0] - turned], axis=1).reshape(-1)
        width *= 2
    product = product / size * twist.conj()
    return np.concatenate([product.real, product.imag])


def test_the_rounding_error_stays_far_below_its_bound() -> None:
    """The largest distance from an integer, for operands at the limit and for spectra that pile up in one place."""
    rng = np.random.default_rng(3)
    degree, worst = 2048, 0.0
    tone = np.cos(np.pi * (2 * 300 + 1) * np.arange(degree) / degree)
    small = np.vstack([at_the_limit(rng, degree), np.trunc(tone * LIMIT / np.linalg.norm(tone))]).astype(np.int32)
    halves = [np.full(degree, -(2**15)), np.where(tone < 0, -(2**15), 2**15 - 1), rng.integers(-(2**15), 2**15, degree)]
    for half in halves:
        for row in small:
            real = unrounded(half, row)
            exact = flint_signed(half, row)
            assert (np.rint(real) == exact).all()
            worst = max(worst, float(np.abs(real - exact).max()))
    assert worst < 0.01, f"{worst:.3g}: the bound says 0.32, experience 0.0003"


def flint_signed(half: NDArray[np.int64], small: I32) -> NDArray[np.float64]:
    """The exact product over the integers (below 2^38, hence exact as floats)."""
    degree = len(half)
    product = flint.fmpz_poly(half.tolist()) * flint.fmpz_poly(small.tolist())
    return np.array([int(product[i]) - int(product[i + degree]) for i in range(degree)], dtype=np.float64)
