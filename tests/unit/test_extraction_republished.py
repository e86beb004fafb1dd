"""Many publications of the same weights in fresh gauges show ΔW·ΔWᵀ within span(B); under a gauge key they do not."""

import numpy as np
import pytest

from splitveil.extraction.republished import gram
from splitveil.lattice.parameters import INSECURE_TEST
from splitveil.private.core import LayerSpec
from splitveil.private.lattice_served import publish
from splitveil.private.published import Publication

RANK, WIDTH, FEATURES = 4, 256, 24


def case(gauge_key: bytes | None = None) -> tuple[list[Publication], np.ndarray]:
    rng = np.random.default_rng(2)
    a = rng.standard_normal((RANK, WIDTH)).astype(np.float32)
    b = (rng.standard_normal((FEATURES, RANK)) * 0.7 ** np.arange(RANK)).astype(np.float32)
    spec = LayerSpec(a, b, 1.0, (("m", FEATURES),))
    # The parameter set has no part in it: ρ, step and Q are the same under any.
    published = [publish([spec], noise=0.0, parameters=INSECURE_TEST, gauge_key=gauge_key)[1] for _ in range(80)]
    delta = b.astype(np.float64) @ a.astype(np.float64)
    return published, delta @ delta.T


def test_in_one_gauge_eighty_publications_show_what_one_does() -> None:
    published, truth = case(bytes(range(32)))
    first = published[0].layers[0]
    for publication in published[1:]:
        layer = publication.layers[0]
        assert (layer.norm_bound, layer.step) == (first.norm_bound, first.step)
        np.testing.assert_array_equal(layer.Q, first.Q)
    assert len({publication.seed for publication in published}) == 80
    assert (
        len(
            {
                publication.layers[0].hint.tobytes()
                for publication in published
                if publication.layers[0].hint is not None
            }
        )
        == 80
    )
    found = gram(published, 0)
    wanted = found.frame.T @ truth @ found.frame
    assert np.linalg.norm(found.values - wanted) > 0.1 * np.linalg.norm(wanted)


def test_enough_publications_show_the_gram_matrix_and_few_do_not() -> None:
    published, truth = case()

    def error(count: int) -> tuple[float, float]:
        found = gram(published[:count], 0)
        wanted = found.frame.T @ truth @ found.frame
        return float(np.linalg.norm(found.values - wanted) / np.linalg.norm(wanted)), found.misfit

    ignorant = np.eye(RANK) * np.trace(truth) / RANK
    wanted = gram(published[:1], 0).frame.T @ truth @ gram(published[:1], 0).frame
    assert np.linalg.norm(ignorant - wanted) > 0.3 * np.linalg.norm(wanted)
    assert error(4)[0] > 0.1, "four numbers do not determine ten"
    found, misfit = error(80)
    assert misfit < 1e-3
    assert found < 1e-2


def test_a_layer_without_a_gauge_adds_nothing() -> None:
    spec = LayerSpec(np.ones((2, 8), dtype=np.float32), None, 1.0, (("m", 2),))
    _, publication = publish([spec], noise=0.0, parameters=INSECURE_TEST)
    with pytest.raises(ValueError, match="with Q"):
        gram([publication], 0)
