"""Usable information and InfoNCE where the information is known, at their limits and past them."""

import math

import pytest
import torch
from information_support import channel, correlated, grouped

from splitveil.errors import NonFiniteError
from splitveil.information.estimate import Claim
from splitveil.information.infonce import InfoNCE
from splitveil.information.usable import Usable


@pytest.mark.parametrize(("symbols", "error"), [(2, 0.05), (16, 0.0), (16, 0.05), (16, 0.5), (256, 0.0), (256, 0.2)])
def test_usable_is_within_ten_percent_on_symmetric_channels(symbols: int, error: float) -> None:
    x, ids, bits = channel(symbols, error, width=32, pairs=4000)
    found = Usable().estimate(x, ids)
    assert found.claim is Claim.AT_LEAST
    assert found.bits == pytest.approx(bits, rel=0.1)
    assert found.low - 0.1 <= bits <= found.high + 0.1
    assert abs(found.floor) < 0.02
    assert found.limit == pytest.approx(math.log2(symbols), rel=0.02)


def test_usable_bits_of_noisy_points_are_fewer_than_there_are() -> None:
    # Four points on a line under noise; the truth is the entropy of the output less the noise's, integrated.
    draw = torch.Generator().manual_seed(4)
    ids = torch.randint(4, (6000,), generator=draw)
    x = (2.0 * ids + torch.randn(6000, generator=draw))[:, None]
    grid = torch.linspace(-8, 14, 20001, dtype=torch.double)
    density = torch.stack([torch.exp(-0.5 * (grid - 2 * k) ** 2) for k in range(4)]).mean(0) / math.sqrt(2 * math.pi)
    entropy = -(density * density.clamp(min=1e-300).log2()).sum().item() * (22 / 20000)
    truth = entropy - 0.5 * math.log2(2 * math.pi * math.e)
    found = Usable().estimate(x, ids)
    assert found.bits == pytest.approx(truth, rel=0.1)
    assert found.bits < truth + 0.05


def test_usable_of_a_channel_that_passes_nothing_is_zero() -> None:
    x, ids, bits = channel(16, 15 / 16, width=32, pairs=2000)
    assert bits == pytest.approx(0, abs=1e-9)
    assert abs(Usable().estimate(x, ids).bits) < 0.02


def test_usable_bits_fall_with_noise_where_most_tokens_are_rare() -> None:
    draw = torch.Generator().manual_seed(5)
    shares = 1 / torch.arange(1, 501, dtype=torch.double)
    ids = torch.multinomial(shares, 2000, replacement=True, generator=draw)
    points = torch.randn(500, 32, generator=draw)
    found = [
        Usable().estimate(points[ids] + noise * torch.randn(2000, 32, generator=draw), ids)
        for noise in (0.01, 1.0, 3.0)
    ]
    values = [one.bits for one in found]
    assert values == sorted(values, reverse=True)
    assert all(one.bits < one.limit for one in found)
    assert values[0] > 0.85 * found[0].limit > 3 * values[-1]


def test_copies_of_a_pair_teach_nothing_about_themselves() -> None:
    # Every group is a fresh point with a random id: only a reader that saw the copy before could know.
    draw = torch.Generator().manual_seed(6)
    x, y = torch.randn(300, 16, generator=draw), torch.randint(4, (300,), generator=draw)
    x, y, groups = grouped(x, y, 5)
    assert Usable().estimate(x, y, groups=groups).bits < 0.05
    assert InfoNCE().estimate(x, y, groups=groups).bits < 0.05


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_infonce_is_within_ten_percent_well_below_its_limit(bits: float, width: int) -> None:
    found = InfoNCE().estimate(*correlated(bits, width, pairs=4000))
    assert found.claim is Claim.AT_LEAST
    assert found.limit == pytest.approx(math.log2(2000))
    assert not found.reason
    assert found.bits == pytest.approx(bits, rel=0.1)
    assert found.low < found.bits < found.high
    assert -0.05 < found.floor < 0.05


@pytest.mark.parametrize("bits", [1, 4])
def test_infonce_is_a_bound_in_many_dimensions(bits: float) -> None:
    found = InfoNCE().estimate(*correlated(bits, 16, pairs=4000))
    assert 0.6 * bits < found.low
    assert found.bits < 1.1 * bits


def test_infonce_finds_dependence_that_no_correlation_shows() -> None:
    x, noise = (torch.randn(4000, 1, generator=torch.Generator().manual_seed(s)) for s in (7, 8))
    found = InfoNCE().estimate(x, x.abs() + 0.1 * noise)
    assert found.bits > 1
    assert abs(found.floor) < 0.05


@pytest.mark.parametrize("pairs", [300, 1000])
def test_infonce_says_so_at_its_limit(pairs: int) -> None:
    found = InfoNCE().estimate(*correlated(16, 4, pairs=pairs))
    assert found.limit == pytest.approx(math.log2(pairs // 2), abs=0.02)
    assert found.limit - 1 < found.bits <= found.limit
    assert "there may be far more" in found.reason
    assert found.claim is Claim.AT_LEAST


def test_infonce_on_channels() -> None:
    for error in (0.0, 0.2):
        x, ids, bits = channel(16, error, width=16, pairs=4000)
        assert InfoNCE().estimate(x, ids).bits == pytest.approx(bits, rel=0.1)


def test_infonce_guesses_where_it_has_learnt_nothing_and_says_so() -> None:
    found = InfoNCE().estimate(*correlated(0, 8, pairs=1000))
    assert (found.bits, found.low, found.high) == (0, 0, 0)
    assert "guessing" in found.reason


def test_refusals() -> None:
    x, y = correlated(2, 2, pairs=600)
    for found, reason in (
        (Usable().estimate(x, y), "real vectors"),
        (Usable().estimate(x, torch.zeros(600, dtype=torch.long)), "1 different ids"),
        (Usable().estimate(x, torch.arange(600), groups=torch.arange(600) % 3), "at least 20 groups"),
        (InfoNCE().estimate(x, torch.arange(600)), "600 different ids"),
        (InfoNCE().estimate(x[:120], y[:120]), "120 pairs"),
    ):
        assert found.refused
        assert reason in found.reason
        assert math.isnan(found.bits)


@pytest.mark.parametrize("estimator", [Usable(), InfoNCE()])
def test_not_finite_is_an_error_and_a_seed_is_repeatable(estimator: Usable | InfoNCE) -> None:
    x, ids, _ = channel(4, 0.1, width=4, pairs=400)
    state = torch.random.get_rng_state()
    assert estimator.estimate(x, ids, seed=3) == estimator.estimate(x, ids, seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    x[5, 2] = math.inf
    with pytest.raises(NonFiniteError):
        estimator.estimate(x, ids)
