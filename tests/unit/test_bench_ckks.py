"""The CKKS peer computes B(Ax) like numpy, and refuses what its layout cannot hold."""

import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from splitveil.bench.ckks import CkksLayer, available
from splitveil.errors import ConfigurationError, NonFiniteError

needs_seal = pytest.mark.skipif(not available(), reason="seal-python is not installed")


def random_layer(
    d_in: int, d_out: int, rank: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    rng = np.random.default_rng(d_in + rank)
    return rng.normal(size=(rank, d_in)), rng.normal(size=(d_out, rank)), rng.normal(size=d_in)


def relative_error(layer: CkksLayer, x: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    """Largest error over the outputs, relative to the largest output."""
    query, norm = layer.encrypt(x)
    got = layer.decrypt(layer.answer(query), norm)
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@needs_seal
@pytest.mark.parametrize(
    ("d_in", "d_out", "rank"),
    [(4096, 4608, 8), (1024, 512, 4), (896, 896, 16), (1000, 8192, 3), (192, 192, 2), (4, 5, 8), (7, 1, 1), (1, 1, 1)],
)
def test_equals_numpy(d_in: int, d_out: int, rank: int) -> None:
    A, B, x = random_layer(d_in, d_out, rank)
    assert relative_error(CkksLayer(A, B), x, B @ (A @ x)) < 1e-5


@needs_seal
def test_sizes_are_those_of_unseeded_ciphertexts() -> None:
    A, B, x = random_layer(64, 64, 2)
    layer = CkksLayer(A, B)
    query, _ = layer.encrypt(x)
    limbs = 2 * 8192 * 8
    assert 3 * limbs <= len(query) < 3 * limbs + 200
    assert limbs <= len(layer.answer(query)) < limbs + 200
    # Steps 1 for the diagonals, 2 to 32 for the folds; three digits of two polynomials modulo four primes each.
    assert layer.key_bytes == pytest.approx(6 * 3 * 4 * limbs, rel=0.02)


@needs_seal
@pytest.mark.parametrize("size", [1e-300, 1e-3, 1.0, 1e9, 1e200])
def test_no_x_wraps(size: float) -> None:
    """The worst case: x along A's strongest direction, all outputs at the bound in both halves."""
    a = np.random.default_rng(0).normal(size=64)
    layer = CkksLayer(np.outer([1.0, 0.0], a), np.tile([100.0, 0.0], (8192, 1)))
    assert relative_error(layer, a * size, np.full(8192, 100.0 * float(a @ a) * size)) < 1e-6


@needs_seal
def test_one_large_entry_of_x() -> None:
    A, B, x = random_layer(1024, 512, 4)
    x[17] = 1e4
    assert relative_error(CkksLayer(A, B), x, B @ (A @ x)) < 1e-5


@needs_seal
def test_zero_diagonals_and_zero_x() -> None:
    """SEAL refuses products with zero plaintexts: they are left out."""
    layer = CkksLayer(np.eye(8, 16), np.eye(8))
    assert relative_error(layer, np.arange(16.0), np.arange(8.0)) < 1e-6
    query, norm = layer.encrypt(np.zeros(16))
    assert not layer.decrypt(layer.answer(query), norm).any()


@needs_seal
def test_queries_may_interleave() -> None:
    A, B, x = random_layer(64, 64, 2)
    layer = CkksLayer(A, B)
    first, second = layer.encrypt(x), layer.encrypt(1000 * x)
    for factor, (query, norm) in ((1000, second), (1, first)):
        assert layer.decrypt(layer.answer(query), norm) == pytest.approx(factor * B @ (A @ x), rel=1e-4)


@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        ((8, 4097), (16, 8), "d_in up to 4096, got 4097"),
        ((8, 64), (8193, 8), "d_out up to 8192, got 8193"),
        ((257, 64), (16, 257), "rank up to 256, got 257"),
        ((8, 64), (16, 4), "A has 8 rows and B has 4 columns"),
        ((64,), (16, 8), "A has shape"),
        ((8, 64), (0, 8), "B has shape"),
    ],
)
def test_refuses_what_the_layout_cannot_hold(a: tuple[int, ...], b: tuple[int, ...], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        CkksLayer(np.ones(a), np.ones(b))


def test_refuses_weights_that_are_zero_or_not_finite() -> None:
    with pytest.raises(ConfigurationError, match="B is zero"):
        CkksLayer(np.ones((2, 4)), np.zeros((4, 2)))
    with pytest.raises(NonFiniteError, match="A holds NaN"):
        CkksLayer(np.full((2, 4), np.nan), np.ones((4, 2)))


@needs_seal
def test_refuses_other_inputs() -> None:
    layer = CkksLayer(np.ones((1, 4)), np.ones((4, 1)))
    with pytest.raises(ConfigurationError, match=r"expected \(4,\)"):
        layer.encrypt(np.ones(5))
    with pytest.raises(NonFiniteError):
        layer.encrypt(np.array([1.0, 2.0, np.inf, 0.0]))


def test_without_seal_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "seal", None)
    assert not available()
    with pytest.raises(ConfigurationError, match=r"pip install 'splitveil\[sealed\]'"):
        CkksLayer(np.ones((2, 4)), np.ones((4, 2)))
