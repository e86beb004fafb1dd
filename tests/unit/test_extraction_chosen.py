"""Chosen queries and the modular ladder: they work where they should, and say so only where they did.

The attacker's only advantage here is a right guess at the peak of the core, a single number; without it, one test
shows, the attack works as well and is a little noisier.
"""

import numpy as np
import pytest
from numpy.typing import NDArray

from splitveil.extraction.chosen import Estimate, assumed_peak, chosen, confirm
from splitveil.extraction.client import Client
from splitveil.lattice.parameters import DEFAULT, ParameterSet
from splitveil.private.columns import Channel, peak_ratio, schemes
from splitveil.private.core import LayerSpec
from splitveil.private.lattice_served import LatticeServed, publish
from splitveil.private.leakage import leakage, rows_until
from splitveil.private.published import Publication

I64 = NDArray[np.int64]
WIDTH, RANK = 256, 4


class Attacked:
    """A published layer, and the truth that only the test knows."""

    def __init__(
        self, noise: float, width: int = WIDTH, rank: int = RANK, parameters: ParameterSet = DEFAULT, heavy: float = 0.0
    ) -> None:
        rng = np.random.default_rng(width)
        weights = rng.standard_normal((rank, width))
        weights *= np.exp(heavy * rng.standard_normal((rank, width)))
        spec = LayerSpec(weights.astype(np.float32), None, 1.0, (("m", rank),))
        served, publication = publish([spec], noise=noise, parameters=parameters)
        self.served: LatticeServed = served
        self.publication: Publication = publication
        self.core: I64 = served._secret[0].matrix[:, :width].astype(np.int64)
        self.peak = peak_ratio([self.core])

    def client(self) -> Client:
        return Client(self.publication, self.served.answer)

    @property
    def channel(self) -> Channel:
        layer = self.publication.layers[0]
        return Channel.of(
            self.publication.parameters,
            layer.width,
            layer.rank,
            layer.norm_bound,
            self.publication.noise,
            self.peak,
        )

    def attack(self, rows: int) -> tuple[Estimate, float]:
        """The estimate, and its relative error."""
        client = self.client()
        found = chosen(client, 0, rows, peak_ratio=self.peak)
        assert found.rows == client.rows[0] <= rows, "an attack may not use more rows than it was granted"
        return found, float(np.linalg.norm(found.values - self.core) / np.linalg.norm(self.core))


def measured_rows(attacked: Attacked, error: float, expected: int) -> int:
    """The fewest rows, in steps of 5 % around ``expected``, after which the attack gets there; 0: the exact core."""
    for share in np.arange(0.7, 1.31, 0.05):
        rows = round(share * expected)
        found, got = attacked.attack(rows)
        if bool((found.integers == attacked.core).all()) if error == 0 else got <= error:
            return rows
    return 10**9


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_fewer_rows_than_columns_leave_the_other_columns_unknown(noise: float) -> None:
    attacked = Attacked(noise)
    found, error = attacked.attack(WIDTH // 4)
    unseen = ~found.seen
    assert unseen.sum() == (WIDTH - WIDTH // 4 * (2 if noise == 0 else 1))
    assert (found.values[:, unseen] == 0).all()
    assert error > 0.65
    assert not confirm(attacked.client(), 0, found.integers)


def test_without_noise_d_rows_give_the_exact_core_and_half_as_many_nearly() -> None:
    attacked = Attacked(0.0)
    found, _ = attacked.attack(WIDTH)
    assert (found.integers == attacked.core).all()
    assert confirm(attacked.client(), 0, found.integers)
    # Two columns share a row: T < d is no protection where there is only the floor.
    found, error = attacked.attack(WIDTH // 2)
    assert error < 0.01
    assert found.seen.all()
    assert not confirm(attacked.client(), 0, found.integers)


def test_the_ladder_is_exact_after_2d_rows_at_1_percent() -> None:
    attacked = Attacked(0.01)
    _, error = attacked.attack(WIDTH)
    assert error == pytest.approx(attacked.peak * 0.01 / np.sqrt(WIDTH), rel=0.3)  # κ_c·θ·δ/√T
    found, _ = attacked.attack(2 * WIDTH)
    assert (found.integers == attacked.core).all()
    assert confirm(attacked.client(), 0, found.integers)


@pytest.mark.parametrize(("noise", "most"), [(0.1, 3), (0.3, 4)])
def test_the_ladder_at_more_noise(noise: float, most: int) -> None:
    attacked = Attacked(noise)
    found, _ = attacked.attack(most * WIDTH)
    assert (found.integers == attacked.core).all()
    assert confirm(attacked.client(), 0, found.integers)


def test_a_ladder_with_too_few_rows_for_its_noise_is_not_called_exact() -> None:
    attacked = Attacked(1.0)
    found, error = attacked.attack(2 * WIDTH)
    assert 0.01 < error < 0.2
    assert not (found.integers == attacked.core).all()
    assert not confirm(attacked.client(), 0, found.integers)
    assert not leakage(attacked.channel, 2 * WIDTH).exact


def test_confirmation_notices_a_single_unit_in_a_single_entry() -> None:
    attacked = Attacked(0.1)
    assert confirm(attacked.client(), 0, attacked.core)
    for entry in ((0, 0), (RANK - 1, WIDTH - 1)):
        wrong = attacked.core.copy()
        wrong[entry] += 1
        assert not confirm(attacked.client(), 0, wrong)


def test_too_low_a_guess_at_the_peak_is_not_called_exact() -> None:
    attacked = Attacked(0.0)
    found = chosen(attacked.client(), 0, WIDTH // 2, peak_ratio=attacked.peak / 3)
    assert np.linalg.norm(found.values - attacked.core) > 0.1 * np.linalg.norm(attacked.core)
    assert not confirm(attacked.client(), 0, found.integers)


def test_the_publication_alone_gives_a_guess_at_the_peak_that_will_do() -> None:
    attacked = Attacked(0.01, heavy=0.3)
    client = attacked.client()
    assert attacked.peak < assumed_peak(client, 0) < 2.5 * attacked.peak
    found = chosen(client, 0, 2 * WIDTH)
    assert (found.integers == attacked.core).all()


def test_repeated_queries_get_fresh_noise_which_averages_away() -> None:
    attacked = Attacked(0.1)
    client = attacked.client()
    query = np.zeros((64, WIDTH), dtype=np.uint32)
    answers = client.ask(0, query).astype(np.float64)
    sigma = client.sigma(0)
    assert answers.std() == pytest.approx(sigma, rel=0.25)
    assert np.abs(answers.mean(axis=0)).max() < 5 * sigma / 8


def test_three_columns_share_a_row_where_there_is_almost_no_noise() -> None:
    """A wide layer under a set with hardly any answer noise; its first columns are enough to see it."""
    quiet = ParameterSet("insecure_quiet", ring_degree=64, pad_width=32, hint_sigma=1.0, answer_sigma=1.0)
    width, rows = 1 << 15, 40
    attacked = Attacked(0.0, width=width, rank=1, parameters=quiet)
    assert max(len(scheme.multipliers) for scheme in schemes(attacked.channel) if scheme.packed) >= 3
    found, _ = attacked.attack(rows)
    assert found.seen.sum() >= 3 * rows
    # Of each three, two come back as integers and the finest with what noise there is.
    wrong = np.abs(found.values - attacked.core)[:, found.seen]
    assert (wrong < 0.5).mean() > 0.72
    assert wrong.max() < 4
    # The floor of the real set does not leave that room.
    real = Channel.of(DEFAULT, width, 1, attacked.publication.layers[0].norm_bound, 0.0, attacked.peak)
    assert max(len(scheme.multipliers) for scheme in schemes(real) if scheme.packed) == 2


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.03, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("error", [0.1, 0.01, 0.0])
def test_the_ledgers_leakage_function_agrees_within_20_percent(noise: float, error: float) -> None:
    attacked = Attacked(noise)
    expected = rows_until(attacked.channel, error)
    assert measured_rows(attacked, error, expected) == pytest.approx(expected, rel=0.2)
