"""The low-rank core: its gauge hides what it should, and its rounding loses what it may."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from splitveil.errors import NonFiniteError
from splitveil.lattice.parameters import INSECURE_TEST
from splitveil.lattice.ring import MAX_SMALL_NORM
from splitveil.private.core import LayerSpec, core_rms, gauged, integer_core
from splitveil.private.layer import publish

F32 = NDArray[np.float32]


def spec(a: F32, b: F32 | None, scale: float = 1.0) -> LayerSpec:
    return LayerSpec(a, b, scale, (("m", len(a) if b is None else len(b)),))


def normal(*shape: int, seed: int = 0) -> F32:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


MAPS = {
    "narrow": (normal(4, 30), normal(17, 4), 2.0),
    "rank 1": (normal(1, 30), normal(17, 1), 0.5),
    "more rows than outputs": (normal(8, 30), normal(3, 8), 1.0),
    "square": (normal(5, 5), normal(5, 5), 1.0),
    "B of rank 1": (normal(4, 30), normal(17, 1) @ normal(1, 4), 1.0),
    "B with a zero column": (normal(4, 30), normal(17, 4) * np.array([1, 0, 1, 1], dtype=np.float32), 1.0),
    "B = 0": (normal(4, 30), np.zeros((17, 4), dtype=np.float32), 1.0),
    "A = 0": (np.zeros((4, 30), dtype=np.float32), normal(17, 4), 1.0),
    "scale 0": (normal(4, 30), normal(17, 4), 0.0),
    "negative scale": (normal(4, 30), normal(17, 4), -3.0),
    "tiny and huge": (normal(4, 30) * np.float32(1e-30), normal(17, 4) * np.float32(1e25), 1.0),
}


@pytest.mark.parametrize("name", MAPS)
def test_the_gauge_keeps_the_map_to_float64_rounding(name: str) -> None:
    a, b, scale = MAPS[name]
    q, core = gauged(spec(a, b, scale))
    assert q is not None
    rank = min(b.shape)
    assert q.shape == (len(b), rank)
    assert core.shape == (rank, a.shape[1])
    assert np.abs(q.T @ q - np.eye(rank)).max() < 1e-13
    exact = scale * (b.astype(np.float64) @ a.astype(np.float64))
    size = abs(scale) * np.linalg.norm(b.astype(np.float64)) * np.linalg.norm(a.astype(np.float64))
    assert np.abs(q @ core - exact).max() <= 1e-14 * size


def test_a_full_rank_layer_is_its_own_core() -> None:
    a = normal(6, 9)
    q, core = gauged(spec(a, None, 2.0))
    assert q is None
    assert (core == 2.0 * a.astype(np.float64)).all()


@pytest.mark.parametrize("name", ["narrow", "rank 1", "B of rank 1", "more rows than outputs"])
def test_two_gauges_differ(name: str) -> None:
    a, b, scale = MAPS[name]
    (q1, c1), (q2, c2) = gauged(spec(a, b, scale)), gauged(spec(a, b, scale))
    assert q1 is not None
    assert q2 is not None
    if name != "rank 1":  # there the gauge is a sign
        assert np.abs(q1 - q2).max() > 1e-3
        assert np.abs(c1 - c2).max() > 1e-3
    assert np.abs(q1 @ q1.T - q2 @ q2.T).max() < 1e-12


def test_two_publications_show_the_same_span_in_different_bases() -> None:
    a, b, _ = MAPS["narrow"]
    shown = []
    for _ in range(2):
        _, publication = publish([spec(a, b)], parameters=INSECURE_TEST, allow_insecure=True)
        q = publication.layers[0].Q
        assert q is not None
        assert q.dtype == np.float32
        shown.append(q.astype(np.float64))
    assert np.abs(shown[0] - shown[1]).max() > 1e-3
    assert np.abs(shown[0] @ shown[0].T - shown[1] @ shown[1].T).max() < 1e-6


def test_the_gauge_hides_the_order_of_the_factorisation() -> None:
    """Without the rotation R is upper triangular, and the last row of the core is the last row of A, scaled."""
    a, b, _ = MAPS["narrow"]
    correlation = np.zeros(300)
    for i in range(300):
        _, core = gauged(spec(a, b))
        correlation[i] = core[-1] @ a[-1] / np.linalg.norm(core[-1]) / np.linalg.norm(a[-1])
    assert np.abs(correlation).mean() < 0.8
    assert -0.3 < correlation.mean() < 0.3


@pytest.mark.parametrize("width", [1, 9, 192, 896, 4096, 14336])
def test_integers_have_the_size_that_balances_the_errors(width: int) -> None:
    core = normal(8, width).astype(np.float64) * 1e-3
    rounded = integer_core(core)
    assert rounded.values.dtype == np.int32
    assert np.sqrt(np.mean(rounded.values.astype(np.float64) ** 2)) == pytest.approx(core_rms(width), rel=1e-3)
    assert core_rms(width) == pytest.approx(math.sqrt(0.289 * 2**32 / 2 / width))
    assert np.abs(rounded.values * rounded.step - core).max() <= rounded.step * (0.5 + 1e-9)


@pytest.mark.parametrize("name", ["even", "one large row", "one large entry", "zero", "tiny", "one"])
def test_the_norm_bound_is_the_longest_row_rounded_up(name: str) -> None:
    core = normal(5, 40).astype(np.float64)
    if name == "one large row":
        core[2] *= 1e9
    if name == "one large entry":
        core[2, 2] = 1e12
    if name == "zero":
        core[:] = 0
    if name == "tiny":
        core *= 1e-200
    if name == "one":
        core = np.eye(1, 40)
    rounded = integer_core(core)
    squares = [sum(value**2 for value in row) for row in rounded.values.tolist()]
    assert rounded.norm_bound == max(1, math.isqrt(max(squares) - 1) + 1 if max(squares) else 0)
    assert max(squares) <= MAX_SMALL_NORM**2, "products with it would not be proven exact"
    assert 0 < rounded.step < math.inf
    if name in ("zero", "tiny"):
        assert rounded.step == 1.0
        assert rounded.norm_bound == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    a, b, _ = MAPS["narrow"]
    bad_a, bad_b = a.copy(), b.copy()
    bad_a[1, 1] = bad_b[1, 1] = bad
    for broken in (spec(bad_a, b), spec(a, bad_b), spec(bad_a, None), spec(a, b, bad)):
        with pytest.raises(NonFiniteError):
            publish([broken], parameters=INSECURE_TEST, allow_insecure=True)


def test_maps_too_large_to_publish_are_refused_at_once() -> None:
    """A step beyond 1e30 would be refused by every client."""
    a, b, _ = MAPS["narrow"]
    for scale in (1e31, 1e300):
        with pytest.raises(NonFiniteError, match="1e30"):
            publish([spec(a, b, scale)], parameters=INSECURE_TEST, allow_insecure=True)
