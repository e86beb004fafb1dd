"""The demo's test for noise: it accepts noise, and rejects what is not."""

import numpy as np
import pytest

from splitveil.demo.noise_test import noise_test
from splitveil.lattice.randomness import secret_bytes


def test_noise_is_accepted() -> None:
    assert noise_test(secret_bytes(1 << 18).view(np.uint32)).looks_like_noise


@pytest.mark.parametrize(
    "make",
    [
        lambda w: w & np.uint32(0xFFFFFFFE),  # one bit that is always 0
        lambda w: np.repeat(w[: len(w) // 2], 2),  # every word twice
        lambda w: (w.astype(np.int32) >> 4).astype(np.uint32),  # small numbers
        lambda w: np.zeros_like(w),
    ],
    ids=["stuck bit", "repeats", "small", "zeros"],
)
def test_the_rest_is_not(make) -> None:
    assert not noise_test(make(secret_bytes(1 << 18).view(np.uint32))).looks_like_noise


def test_p_values_are_uniform_on_noise() -> None:
    p = np.array([noise_test(secret_bytes(1 << 14).view(np.uint32)).bytes_p for _ in range(200)])
    assert 0.35 < p.mean() < 0.65
    assert p.min() > 1e-6
