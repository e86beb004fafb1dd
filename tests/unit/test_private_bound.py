"""No answer wraps around, whatever x is; and the errors have the sizes that the design states."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import reference
from numpy.typing import NDArray

from splitveil.lattice.parameters import DEFAULT, INSECURE_TEST, ParameterSet
from splitveil.private.bound import HALF, SIGMAS, budget
from splitveil.private.core import LayerSpec, core_rms
from splitveil.private.lattice_public import LatticePublic, LatticeSite
from splitveil.private.lattice_served import LatticeServed, publish
from splitveil.private.masks import OneTimeMask
from splitveil.private.published import MAX_NOISE, MAX_NORM_BOUND, MAX_WIDTH

F64 = NDArray[np.float64]
NOISES = [0.0, 0.3, 1.0]


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("width", [1, 30, 192, 4096, 14336])
@pytest.mark.parametrize("parameters", [DEFAULT, INSECURE_TEST], ids=lambda p: p.name)
def test_the_budget_is_the_formula_of_the_design(parameters: ParameterSet, width: int, noise: float) -> None:
    for rho in (1, 1000, 131072):
        p = parameters
        got = budget(p, width, rho, noise)
        theta = reference.theta(width, rho, noise, p.ring_degree, p.pad_width, p.pad_bound, p.hint_sigma)
        assert got.theta == pytest.approx(theta, rel=1e-12)
        assert got.answer_sigma == pytest.approx(max(256.0, noise * theta * 2**31 / math.sqrt(width)), rel=1e-12)
        # The signal at its largest, and everything else at 8 σ, is within half the modulus.
        spread = rho**2 + p.pad_width * p.pad_sigma**2 + 2 / 3 * p.ring_degree * p.hint_sigma**2
        with_noise = math.sqrt(got.limit_square) + SIGMAS * math.sqrt(spread + got.answer_sigma**2)
        assert with_noise <= HALF * (1 + 1e-9)


def test_theta_at_common_widths() -> None:
    """For a core whose rows are equally long, as those of an even spectrum are."""
    values = [budget(DEFAULT, d, math.ceil(core_rms(d) * math.sqrt(d)), 0.0).theta for d in (192, 896, 4096, 14336)]
    assert values == sorted(values, reverse=True)
    assert values == pytest.approx([0.99982, 0.99974, 0.99954, 0.99921], abs=3e-5)


def test_theta_is_positive_wherever_a_publication_may_lead() -> None:
    for rho in (1, MAX_NORM_BOUND):
        for width in (1, MAX_WIDTH):
            for noise in (0.0, MAX_NOISE):
                assert 0 < budget(DEFAULT, width, rho, noise).theta < 1


def adversarial(core: NDArray[np.int64], rng: np.random.Generator) -> Iterator[F64]:
    """Inputs that drive answers to the limit: along rows of the core, at its largest entries, with its signs."""
    for row in core:
        yield row.astype(np.float64)
        yield -row.astype(np.float64)
        yield np.sign(row) + (row == 0)
        largest = np.abs(row) == np.abs(row).max()
        yield np.where(largest, np.sign(row), 0.0)
        yield np.where(largest, -1e-40, 1e-45)
        yield row + rng.standard_normal(len(row)) * np.abs(row).mean() / 10
    longest = core[np.argmax((core**2).sum(axis=1))].astype(np.float64)
    yield longest * 1e30
    yield longest * 1e-43
    yield longest + 0.5
    for _ in range(10):
        yield rng.standard_normal(core.shape[1]) @ np.diag(10 ** rng.uniform(-6, 0, core.shape[1]))


def exchange(site: LatticeSite, served: LatticeServed, x: F64) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(x̂, what is left of the answers), both signed integers, a row for each row of x."""
    masks = [mask.consume() for mask in site.make_masks(len(x)) if isinstance(mask, OneTimeMask)]
    query, _ = site.query(x.astype(np.float32), [OneTimeMask(*mask) for mask in masks])
    sent = np.frombuffer(query, dtype="<u4").reshape(len(x), -1)
    encoded = (sent - np.array([mask[0] for mask in masks])).view(np.int32).astype(np.int64)[:, : site.width]
    answer = np.frombuffer(served.answer([0], len(x), query), dtype="<u4").reshape(len(x), -1)
    left = (answer - np.array([mask[1] for mask in masks])).view(np.int32).astype(np.int64)
    return encoded, left


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(
    ("width", "shape", "parameters"),
    [
        (9, "normal", INSECURE_TEST),
        (64, "normal", INSECURE_TEST),
        (200, "peaked", INSECURE_TEST),
        (896, "normal", INSECURE_TEST),
        (192, "normal", DEFAULT),
        (896, "peaked", DEFAULT),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_no_answer_wraps_whatever_is_asked(width: int, shape: str, parameters: ParameterSet, noise: float) -> None:
    rng = np.random.default_rng(width)
    weights = rng.standard_normal((4, width))
    if shape == "peaked":
        weights[1, 5] = 400
    spec = LayerSpec(weights.astype(np.float32), None, 1.0, (("m", 4),))
    served, publication = publish([spec], noise=noise, parameters=parameters)
    site = LatticePublic(publication).site([0])
    assert isinstance(site, LatticeSite)
    core = served._secret[0].matrix[:, :width].astype(np.int64)
    rho = publication.layers[0].norm_bound
    theta, g_sigma = budget(parameters, width, rho, noise).theta, budget(parameters, width, rho, noise).answer_sigma
    variance = rho**2 + parameters.pad_width * parameters.pad_sigma**2 + g_sigma**2
    sigma = math.sqrt(variance + 2 / 3 * parameters.ring_degree * parameters.hint_sigma**2)
    nearest = 0.0
    x = np.array(list(adversarial(core, rng)))
    for _ in range(20):
        encoded, left = exchange(site, served, x)
        exact = encoded @ core.T  # below 2^31 by the bound, so that int64 holds it
        assert (np.abs(exact) < HALF).all()
        assert np.abs(left - exact).max() <= SIGMAS * sigma, "an answer wrapped, or a noise is too large"
        nearest = max(nearest, float(np.abs(exact).max() / HALF))
    assert nearest == pytest.approx(theta, rel=1e-2), "the inputs are not the worst ones"


def test_a_query_beyond_the_bound_is_not_sent() -> None:
    spec = LayerSpec(np.ones((2, 30), dtype=np.float32), None, 1.0, (("m", 2),))
    _, publication = publish([spec], noise=0.0, parameters=INSECURE_TEST)
    site = LatticePublic(publication).site([0])
    assert isinstance(site, LatticeSite)
    x = np.full((1, 30), 0.7, dtype=np.float32)
    site.query(x, site.make_masks(1))
    site._size *= 1.01
    with pytest.raises(ArithmeticError, match="nothing was sent"):
        site.query(x, site.make_masks(1))


def test_the_most_demanding_layer_sets_the_size() -> None:
    """Two layers of one site with very different ρ: neither wraps."""
    rng = np.random.default_rng(0)
    even = rng.standard_normal((3, 40)).astype(np.float32)
    uneven = even * np.array([[1], [1], [3000]], dtype=np.float32)
    specs = [LayerSpec(even, None, 1.0, (("m", 3),)), LayerSpec(uneven, None, 1.0, (("n", 3),))]
    served, publication = publish(specs, noise=0.0, parameters=INSECURE_TEST)
    bounds = [layer.norm_bound for layer in publication.layers]
    assert bounds[1] > 1.4 * bounds[0]
    site = LatticePublic(publication).site([0, 1])
    x = uneven[2:] * np.float32(1e-3)
    query, pending = site.query(x, site.make_masks(1))
    first, second = site.recover(pending, served.answer([0, 1], 1, query))
    assert first[0] == pytest.approx(even @ x[0], rel=1e-2, abs=1e-2)
    assert second[0] == pytest.approx(uneven @ x[0], rel=1e-2, abs=1e-2 * float(np.abs(uneven @ x[0]).max()))


@pytest.mark.parametrize(("width", "stated"), [(192, 2e-4), (896, 5e-4), (4096, 1e-3), (14336, 2e-3)])
def test_the_relative_error_is_the_one_stated(width: int, stated: float) -> None:
    rng = np.random.default_rng(width)
    # An even spectrum: in an uneven one the longest row sets the scale, and the others' errors are relatively larger.
    a = np.linalg.qr(rng.standard_normal((width, 4)))[0].T.astype(np.float32)
    b = np.linalg.qr(rng.standard_normal((50, 4)))[0].astype(np.float32)
    served, publication = publish([LayerSpec(a, b, 2.0, (("m", 50),))], noise=0.0, parameters=DEFAULT)
    site = LatticePublic(publication).site([0])
    q = publication.layers[0].Q
    assert q is not None
    x = rng.standard_normal((48, width)).astype(np.float32)
    query, pending = site.query(x, site.make_masks(48))
    (core,) = site.recover(pending, served.answer([0], 48, query))
    exact = 2.0 * x.astype(np.float64) @ a.T.astype(np.float64) @ b.T.astype(np.float64)
    error = float(np.linalg.norm(core @ q.T - exact) / np.linalg.norm(exact))
    assert stated / 1.5 < error < stated * 1.5
