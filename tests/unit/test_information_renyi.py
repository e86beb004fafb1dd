"""What the matrix-based measure claims: it rises with mutual information, with width and pairs fixed; and no more."""

import math

import pytest
import torch
from information_support import channel, correlated

from splitveil.errors import ConfigurationError
from splitveil.information.estimate import Claim
from splitveil.information.renyi import MatrixRenyi


@pytest.mark.parametrize("width", [1, 4, 16])
def test_it_rises_with_mutual_information(width: int) -> None:
    found = [MatrixRenyi().estimate(*correlated(bits, width, pairs=1600)) for bits in (0, 1, 2, 4, 8)]
    excess = [one.excess for one in found]
    assert excess == sorted(excess)
    assert abs(excess[0]) < 0.02 < excess[1]
    assert all(one.claim is Claim.RELATIVE for one in found)


def test_it_is_not_mutual_information() -> None:
    # Why it claims no bits: the same 4 bits, in other dimensions; and a floor far from 0.
    narrow, wide = (MatrixRenyi().estimate(*correlated(4, width, pairs=1600)) for width in (1, 16))
    assert narrow.excess > 5 * wide.excess
    assert wide.floor > 0.4


def test_it_falls_with_the_errors_of_a_channel() -> None:
    found = [MatrixRenyi().estimate(*channel(16, error, 32, pairs=1600)[:2]) for error in (0, 0.05, 0.2, 0.5, 15 / 16)]
    excess = [one.excess for one in found]
    assert excess == sorted(excess, reverse=True)
    assert abs(excess[-1]) < 0.05


def test_scale_and_place_do_not_matter() -> None:
    x, y = correlated(2, 4, pairs=800)
    moved = MatrixRenyi().estimate(1e3 * x + 40, y)
    assert moved.bits == pytest.approx(MatrixRenyi().estimate(x, y).bits, abs=1e-4)


def test_entropy_at_its_extremes() -> None:
    ids = torch.arange(800)
    far = torch.eye(800)
    found = MatrixRenyi(width=0.05).estimate(far, ids)  # all apart in both kernels: log2 n each, and together
    assert found.bits == pytest.approx(math.log2(400), abs=1e-3)
    assert found.limit == pytest.approx(math.log2(400))
    constant = MatrixRenyi().estimate(torch.zeros(800, 3), ids)
    assert constant.bits == pytest.approx(0, abs=1e-9)


def test_too_few_pairs_are_refused_and_nonsense_is_an_error() -> None:
    found = MatrixRenyi().estimate(*correlated(2, 2, pairs=799))
    assert found.refused
    assert "two subsamples of 400" in found.reason
    for wrong in ({"alpha": 1.0}, {"alpha": -1.0}, {"width": 0.0}, {"repeats": 1}):
        with pytest.raises(ConfigurationError):
            MatrixRenyi(**wrong)
