"""The front door: linear layers of every kind come back as they were, within the error of the design."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from splitveil.errors import ConfigurationError, InsecureParametersError, NonFiniteError, PublicationError
from splitveil.lattice.parameters import INSECURE_TEST
from splitveil.private import PrivateLinear, Publication
from splitveil.private.core import LayerSpec
from splitveil.private.layer import public_half, publish

F32 = NDArray[np.float32]


def normal(*shape: int, seed: int = 0) -> F32:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def through(linear: object, x: F32, **options: float) -> F32:
    """The layer's output by the private protocol."""
    served, public = PrivateLinear.publish(linear, **options)
    query, pending = public.query(x)
    return public.recover(pending, served.answer([0], len(x), query))


def error(got: F32, exact: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("bias", [True, False])
def test_a_full_rank_linear_layer(bias: bool) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(300, 40, bias=bias)
    x = normal(11, 300)
    got = through(linear, x)
    assert got.dtype == np.float32
    assert got.shape == (11, 40)
    assert error(got, linear.double()(torch.from_numpy(x).double()).detach().numpy()) < 1e-3


@pytest.mark.parametrize("rank", [1, 4, 60])
@pytest.mark.parametrize(("width", "outputs"), [(50, 17), (2500, 17)])
def test_a_low_rank_map(rank: int, width: int, outputs: int) -> None:
    a, b, x = normal(rank, width, seed=1), normal(outputs, rank, seed=2), normal(5, width, seed=3)
    got = through((a, b), x, scale=1.5)
    assert error(got, 1.5 * (x.astype(np.float64) @ a.T.astype(np.float64)) @ b.T.astype(np.float64)) < 2e-3


def test_tensors_are_taken_as_they_are() -> None:
    a = torch.nn.Parameter(torch.randn(3, 50, dtype=torch.bfloat16))
    b = torch.randn(7, 3, dtype=torch.float64)
    x = normal(2, 50)
    exact = x.astype(np.float64) @ a.detach().double().numpy().T @ b.numpy().T
    assert error(through((a, b), x), exact) < 1e-3


def test_a_map_of_deficient_rank() -> None:
    a, b, x = normal(4, 80, seed=1), normal(20, 2, seed=2) @ normal(2, 4, seed=3), normal(5, 80, seed=4)
    assert error(through((a, b), x), (x.astype(np.float64) @ a.T) @ b.T.astype(np.float64)) < 1e-3


@pytest.mark.parametrize("zero", ["A", "B", "scale"])
def test_a_map_that_is_zero_stays_within_the_noise(zero: str) -> None:
    """As a fresh LoRA is. The unit of a zero core is 1, so what is left is the noise over the scale of the query."""
    a, b = normal(4, 80), normal(20, 4)
    if zero == "A":
        a[:] = 0
    if zero == "B":
        b[:] = 0
    x = normal(5, 80)
    got = through((a, b), x, scale=0.0 if zero == "scale" else 1.0)
    assert np.abs(got).max() < 1e-4 * np.linalg.norm(x, axis=1).max()


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e30])
def test_inputs_of_every_size(size: float) -> None:
    a, b = normal(4, 80, seed=1), normal(20, 4, seed=2)
    x = (normal(3, 80, seed=3).astype(np.float64) * size).astype(np.float32)
    exact = (x.astype(np.float64) @ a.T.astype(np.float64)) @ b.T.astype(np.float64)
    assert error(through((a, b), x), exact) < (1e-3 if size > 1e-35 else 0.3)


def test_noise_is_added_as_asked() -> None:
    a, b, x = normal(4, 400, seed=1), normal(20, 4, seed=2), normal(200, 400, seed=3)
    exact = (x.astype(np.float64) @ a.T.astype(np.float64)) @ b.T.astype(np.float64)
    # δ is relative to the longest row of the core, in a gauge that is drawn anew: more for an uneven spectrum.
    assert 0.09 < error(through((a, b), x, noise=0.1), exact) < 0.15


@pytest.mark.parametrize("noise", [-0.1, 10.1, float("nan"), float("inf")])
def test_noise_outside_its_range_is_refused(noise: float) -> None:
    with pytest.raises(ConfigurationError, match="outside"):
        PrivateLinear.publish((normal(2, 9), normal(3, 2)), noise=noise)


def test_shapes_that_do_not_fit_are_refused() -> None:
    for a, b in ((normal(2, 9), normal(3, 4)), (normal(9), normal(3, 9)), (normal(2, 9), normal(3, 2, 1))):
        with pytest.raises(ConfigurationError, match="are needed"):
            PrivateLinear.publish((a, b))


def test_an_input_that_is_not_finite_raises_after_the_exchange() -> None:
    served, public = PrivateLinear.publish((normal(2, 9), normal(3, 2)))
    x = np.full((1, 9), np.inf, dtype=np.float32)
    query, pending = public.query(x)
    answer = served.answer([0], 1, query)
    with pytest.raises(NonFiniteError):
        public.recover(pending, answer)


# The plain engine and insecure parameter sets, which are for tests.

SPEC = LayerSpec(normal(2, 9), normal(3, 2), 1.0, (("m", 3),))


def test_what_hides_nothing_is_refused_unless_code_allows_it() -> None:
    for options in ({"engine": "plain"}, {"parameters": INSECURE_TEST}):
        with pytest.raises(ConfigurationError, match="hide nothing"):
            publish([SPEC], **options)  # type: ignore[arg-type]
    _, plain = publish([SPEC], engine="plain", allow_insecure=True)
    with pytest.raises(PublicationError, match="plain engine"):
        Publication.from_bytes(plain.to_bytes())
    _, weak = publish([SPEC], parameters=INSECURE_TEST, allow_insecure=True)
    with pytest.raises(InsecureParametersError, match="tests only"):
        Publication.from_bytes(weak.to_bytes())
    with pytest.raises(ConfigurationError, match="unknown engine"):
        publish([SPEC], engine="oracle")


@pytest.mark.parametrize("engine", ["plain", "lattice"])
def test_both_engines_answer_alike(engine: str) -> None:
    specs = [SPEC, LayerSpec(normal(4, 9, seed=5), None, 2.0, (("n", 3), ("o", 1)))]
    served, made = publish(specs, engine=engine, allow_insecure=True)
    publication = Publication.from_bytes(made.to_bytes(), allow_insecure=True)
    assert publication == made
    site = public_half(publication).site([1, 0])
    x = normal(6, 9, seed=6)
    query, pending = site.query(x, site.make_masks(6))
    assert len(query) == 6 * site.query_size
    full, low = site.recover(pending, served.answer([1, 0], 6, query))
    q = publication.layers[0].Q
    assert q is not None
    assert error(full, 2.0 * x.astype(np.float64) @ specs[1].A.T.astype(np.float64)) < 1e-3
    assert error(low @ q.T, x.astype(np.float64) @ SPEC.A.T @ normal(3, 2).T.astype(np.float64)) < 1e-3


def test_a_publication_survives_its_byte_form() -> None:
    served, public = PrivateLinear.publish((normal(3, 50), normal(7, 3)), noise=0.01)
    read = Publication.from_bytes(public.publication.to_bytes())
    assert read == public.publication
    for before, after in zip(public.publication.layers, read.layers, strict=True):
        assert np.array_equal(before.Q, after.Q)  # type: ignore[arg-type]
        assert np.array_equal(before.hint, after.hint)  # type: ignore[arg-type]
    x = normal(2, 50)
    other = PrivateLinear(read)
    query, pending = other.query(x)
    assert other.recover(pending, served.answer([0], 2, query)).shape == (2, 7)
