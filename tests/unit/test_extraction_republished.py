"""Many publications of the same weights show ΔW·ΔWᵀ within span(B): a known gap, kept here as an attack that works."""

import numpy as np
import pytest

from splitveil.extraction.republished import gram
from splitveil.lattice.parameters import INSECURE_TEST
from splitveil.private.core import LayerSpec
from splitveil.private.lattice_served import publish
from splitveil.private.published import Publication

RANK, WIDTH, FEATURES = 4, 256, 24


def case() -> tuple[list[Publication], np.ndarray]:
    rng = np.random.default_rng(2)
    a = rng.standard_normal((RANK, WIDTH)).astype(np.float32)
    b = (rng.standard_normal((FEATURES, RANK)) * 0.7 ** np.arange(RANK)).astype(np.float32)
    spec = LayerSpec(a, b, 1.0, (("m", FEATURES),))
    # The parameter set has no part in it: ρ, step and Q are the same under any.
    published = [publish([spec], noise=0.0, parameters=INSECURE_TEST)[1] for _ in range(80)]
    delta = b.astype(np.float64) @ a.astype(np.float64)
    return published, delta @ delta.T


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
