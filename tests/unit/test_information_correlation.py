"""Rank correlation against scipy's, and its interval against simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from splitveil.errors import ConfigurationError
from splitveil.information.correlation import ranks, spearman


@pytest.mark.parametrize("points", [4, 7, 8, 30])
@pytest.mark.parametrize("levels", [3, 1000])
def test_rho_is_scipys_with_and_without_ties(points: int, levels: int) -> None:
    draw = np.random.default_rng(points + levels)
    for _ in range(20):
        a = draw.integers(levels, size=points).astype(float)
        b = np.round(a / levels + draw.normal(size=points), 1)
        if np.ptp(a) == 0 or np.ptp(b) == 0:
            continue
        np.testing.assert_array_equal(ranks(a), stats.rankdata(a))
        found = spearman(a.tolist(), b.tolist())
        assert found.rho == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
        assert found.low <= found.rho <= found.high
        assert (found.points, found.dropped) == (points, 0)


def test_p_values_are_scipys_permutation_test() -> None:
    draw = np.random.default_rng(1)
    a, b = draw.normal(size=7), draw.normal(size=7)
    exact = stats.permutation_test(
        (a,), lambda x: stats.spearmanr(x, b).statistic, permutation_type="pairings", n_resamples=np.inf
    )
    assert spearman(a.tolist(), b.tolist()).p_value == pytest.approx(exact.pvalue, abs=1e-9)
    a, b = draw.normal(size=40), draw.normal(size=40)
    b += 0.4 * a
    assert spearman(a.tolist(), b.tolist()).p_value == pytest.approx(stats.spearmanr(a, b).pvalue, abs=0.01)


def test_perfect_agreement_of_few_points_is_no_certainty() -> None:
    found = spearman([1, 2, 3, 4, 5, 6, 7], [10, 20, 30, 40, 50, 60, 70])
    assert (found.rho, found.high) == pytest.approx((1, 1))
    assert 0.5 < found.low < 0.95
    assert found.p_value == pytest.approx(2 / math.factorial(7))
    opposite = spearman([1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1])
    assert (opposite.rho, opposite.high) == pytest.approx((-1, -found.low))
    assert spearman([1, 2, 3, 4], [1, 2, 3, 4]).low < 0


@pytest.mark.parametrize("points", [7, 14, 42])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(points: int) -> None:
    draw = np.random.default_rng(points)
    correlation = 0.7
    truth = 6 / math.pi * math.asin(correlation / 2)  # Spearman's ρ of a bivariate Gaussian
    held = 0
    for _ in range(100):
        a, b = draw.multivariate_normal([0, 0], [[1, correlation], [correlation, 1]], size=points).T
        found = spearman(a.tolist(), b.tolist())
        held += found.low <= truth <= found.high
    assert held >= 88


def test_what_was_not_measured_is_left_out_and_too_little_gives_no_number() -> None:
    nan = math.nan
    found = spearman([1, nan, 2, 3, 4, 5], [1, 2, 3, nan, 4, 5])
    assert (found.points, found.dropped, found.rho) == (4, 2, pytest.approx(1))
    for a, b, reason in (
        ([1, 2, nan, nan], [1, 2, 3, 4], "2 points"),
        ([], [], "0 points"),
        ([1, 1, 1, 1, 1], [1, 2, 3, 4, 5], "equal"),
    ):
        none = spearman(a, b)
        assert reason in none.reason
        assert all(math.isnan(value) for value in (none.rho, none.low, none.high, none.p_value))
    with pytest.raises(ConfigurationError, match="got 1 and 2"):
        spearman([1], [1, 2])
