"""Properties of ring products, for operands that hypothesis chooses."""

import math

import numpy as np
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from splitveil.lattice.ring import MAX_SMALL_NORM, FixedElement, multiply, reflect

WORDS = st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0, 0x7FFF7FFF, 0x80008000, 0xFFFF8000, 2**31, 2**32 - 1]))
DEGREES = st.sampled_from([4, 8, 16, 32])


@st.composite
def operands(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """A fixed element, and a small one whose 2-norm is within the limit."""
    degree = draw(DEGREES)
    bound = int(MAX_SMALL_NORM / math.sqrt(degree))
    entry = st.one_of(st.integers(-bound, bound), st.sampled_from([-bound, bound]))
    fixed = draw(st.lists(WORDS, min_size=degree, max_size=degree))
    return fixed, draw(st.lists(entry, min_size=degree, max_size=degree))


def product(fixed: list[int], small: list[int]) -> list[int]:
    element = FixedElement.of(np.array(fixed, dtype=np.uint32))
    return list(multiply(element, np.array([small], dtype=np.int32))[0].tolist())


@settings(max_examples=150, deadline=None)
@given(operands())
def test_products_equal_the_reference(pair: tuple[list[int], list[int]]) -> None:
    assert product(*pair) == reference.multiply(*pair)


@settings(max_examples=75, deadline=None)
@given(operands())
def test_reflection_is_a_ring_homomorphism(pair: tuple[list[int], list[int]]) -> None:
    fixed, small = pair
    whole = np.array(product(fixed, small), dtype=np.uint32)
    mirrored = [reference.centred(value) for value in reference.reflect(small)]
    assert reflect(whole).tolist() == product(reflect(np.array(fixed, dtype=np.uint32)).tolist(), mirrored)


@settings(max_examples=75, deadline=None)
@given(operands(), st.integers(0, 31))
def test_multiplying_by_a_power_of_x_turns_the_coefficients(pair: tuple[list[int], list[int]], shift: int) -> None:
    fixed, _ = pair
    shift %= len(fixed)
    power = [int(i == shift) for i in range(len(fixed))]
    turned = [-value % reference.Q for value in fixed[len(fixed) - shift :]] + fixed[: len(fixed) - shift]
    assert product(fixed, power) == turned
