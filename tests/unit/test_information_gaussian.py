"""The Gaussian closed form and the capacity under noise, on cases whose information is known; and what they refuse."""

import math

import pytest
import torch
from information_support import correlated, grouped

from splitveil.errors import ConfigurationError, NonFiniteError
from splitveil.information.estimate import Claim
from splitveil.information.gaussian import Capacity, Gaussian


@pytest.mark.parametrize("width", [1, 4, 16])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_within_ten_percent_of_the_closed_form(bits: float, width: int) -> None:
    found = Gaussian().estimate(*correlated(bits, width, pairs=4000))
    assert found.claim is Claim.VALUE
    assert found.bits == pytest.approx(bits, rel=0.1)
    assert found.low < found.bits < found.high < 1.2 * bits
    assert abs(found.floor) < 0.05


def test_unbiased_where_features_are_many_for_the_pairs() -> None:
    # 2 × 16 features and 130 pairs: without the correction, independent pairs would seem to share 1.6 bits.
    independent = [Gaussian().estimate(*correlated(0, 16, pairs=130, seed=s)).bits for s in range(40)]
    dependent = [Gaussian().estimate(*correlated(4, 16, pairs=130, seed=s)).bits for s in range(40)]
    assert sum(independent) / 40 == pytest.approx(0, abs=0.15)
    assert sum(dependent) / 40 == pytest.approx(4, abs=0.25)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    found = [Gaussian().estimate(*correlated(2, 2, pairs=400, seed=s)) for s in range(100)]
    assert not any(one.refused for one in found)
    assert sum(one.low <= 2 <= one.high for one in found) >= 88


def test_copies_of_pairs_do_not_narrow_the_interval() -> None:
    x, y = correlated(2, 2, pairs=500)
    once = Gaussian().estimate(x, y)
    twice = Gaussian().estimate(*grouped(x, y, 8)[:2], groups=grouped(x, y, 8)[2])
    assert twice.high - twice.low > 0.6 * (once.high - once.low)


def test_constant_features_do_not_matter() -> None:
    x, y = correlated(2, 2, pairs=1000)
    wider = torch.cat([x, torch.full((1000, 3), 7.0), x[:, :1] * 2], 1)
    assert Gaussian().estimate(wider, y).bits == pytest.approx(Gaussian().estimate(x, y).bits, abs=1e-6)


def test_refusals() -> None:
    x, y = correlated(2, 2, pairs=4000)
    sign = torch.where(torch.rand(4000, 2, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)
    cases = {
        "ids": (x, torch.arange(4000)),
        "needs four pairs a feature": (x[:12], y[:12]),
        "infinitely many bits": (x, x @ torch.tensor([[1.0], [2.0]])),
        "not jointly Gaussian": (x, x * sign),  # uncorrelated, although |y| = |x|
        "constant": (x, torch.ones(4000, 1)),
        "drawn from a list": (x[:100].repeat(40, 1) + y, x[:100].repeat(40, 1)),  # a hundred points under noise
    }
    for reason, (a, b) in cases.items():
        found = Gaussian().estimate(a, b)
        assert found.refused
        assert reason in found.reason
        assert all(math.isnan(value) for value in (found.bits, found.low, found.high, found.floor, found.excess))


def test_malformed_pairs_are_errors() -> None:
    x, y = correlated(1, 2, pairs=100)
    with pytest.raises(ConfigurationError, match=r"got \(100, 2\) and \(99, 2\)"):
        Gaussian().estimate(x, y[:99])
    with pytest.raises(ConfigurationError, match="none empty"):
        Gaussian().estimate(x[:0], y[:0])
    with pytest.raises(ConfigurationError, match="integer ids"):
        Gaussian().estimate(x, y[:, 0])
    with pytest.raises(ConfigurationError, match="one group id a pair"):
        Gaussian().estimate(x, y, groups=torch.zeros(99))
    with pytest.raises(NonFiniteError):
        Gaussian().estimate(x.clone().fill_(math.nan), y)


@pytest.mark.parametrize("width", [1, 4, 16])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_capacity_is_that_of_gaussian_channels_in_parallel(bits: float, width: int) -> None:
    draw = torch.Generator().manual_seed(2)
    shares = torch.rand(width, generator=draw) + 0.5
    shares *= bits / shares.sum()
    noise = 0.3
    deviations = noise * (2 ** (2 * shares) - 1).sqrt()  # ½ log2(1 + λ/σ²) = share
    basis = torch.linalg.qr(torch.randn(width, width, generator=draw))[0]
    x = (torch.randn(4000, width, generator=draw) * deviations) @ basis + 5
    found = Capacity(noise).estimate(x, torch.arange(4000))
    assert found.claim is Claim.AT_MOST
    assert found.bits == pytest.approx(bits, rel=0.1)
    assert found.low < found.bits < found.high
    assert math.isnan(found.floor)


def test_capacity_bounds_what_a_sign_tells_and_what_few_rows_show() -> None:
    draw = torch.Generator().manual_seed(3)
    signs = torch.where(torch.rand(2000, 1, generator=draw) < 0.5, -1.0, 1.0)
    assert 1 < Capacity(0.1).estimate(signs, torch.arange(2000)).bits < 4  # the truth is 1 bit
    # Fewer rows than features: the covariance fitted to all of them would seem to leave less than there is.
    truth = 32 * 0.5 * math.log2(2)
    few = [Capacity(1.0).estimate(torch.randn(24, 32, generator=draw), torch.arange(24)).bits for _ in range(20)]
    assert sum(few) / 20 > truth


def test_capacity_without_noise_is_refused_and_nonsense_is_an_error() -> None:
    found = Capacity(0.0).estimate(torch.randn(50, 3), torch.arange(50))
    assert found.refused
    assert "unbounded" in found.reason
    for noise in (-1.0, math.nan, math.inf):
        with pytest.raises(ConfigurationError):
            Capacity(noise)
