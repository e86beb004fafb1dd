"""The leakage function by itself: monotone, consistent, and as the design's formulas say. Attacks check its figures."""

import math
from itertools import pairwise

import numpy as np
import pytest

from splitveil.lattice.parameters import DEFAULT, Q
from splitveil.private.columns import Channel, averaged_sigma, peak_ratio, plan, schemes, upper_tail
from splitveil.private.core import core_rms
from splitveil.private.leakage import LEARNED, leakage, rows_until


def channel(noise: float, width: int = 256, peak: float = 4.5) -> Channel:
    return Channel.of(DEFAULT, width, 16, round(1.2 * core_rms(width) * math.sqrt(width)), noise, peak)


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.1, 0.3])
def test_more_rows_never_know_less_and_never_cost_more_than_granted(noise: float) -> None:
    one = channel(noise)
    errors = [leakage(one, rows).error for rows in range(0, 1400, 7)]
    assert errors[0] == 1.0
    assert all(after <= before + 1e-9 for before, after in pairwise(errors))
    for rows in (0, 1, 2, 100, 127, 128, 129, 255, 256, 257, 300, 511, 512, 513, 5000):
        assert plan(one, rows).rows <= rows
        assert sum(columns for columns, _ in plan(one, rows).parts) <= one.width


def test_one_row_a_column_has_the_designs_error() -> None:
    for noise in (0.003, 0.01, 0.1):
        one = channel(noise, width=1024)
        # κ_c·θ·δ/√T at T = d; the room for noise beside the peak is what is left to the design's formula.
        assert leakage(one, 1024).error == pytest.approx(4.5 * noise / math.sqrt(1024), rel=0.05)


@pytest.mark.parametrize(("noise", "width", "times"), [(0.01, 256, 2), (0.1, 4096, 2), (0.1, 256, 3), (0.3, 4096, 3)])
def test_the_ladder_is_exact_after_the_designs_multiples_of_d(noise: float, width: int, times: int) -> None:
    one = channel(noise, width, peak=4.3)
    assert leakage(one, times * width).exact
    assert not leakage(one, (times - 1) * width).exact
    assert (times - 1) * width < rows_until(one, 0.0) <= times * width


def test_exact_means_as_likely_as_not() -> None:
    """Between two schemes the expected number of wrong entries falls with every column that gets the richer one."""
    one = channel(0.03, peak=4.7)
    rows = rows_until(one, 0.0)
    assert 2 * one.width < rows < 3 * one.width
    for count, few in ((rows, True), (rows - 1, False)):
        wrong = sum(columns * scheme.wrong for columns, scheme in plan(one, count).parts)
        assert (wrong <= math.log(2)) == few
        assert wrong == pytest.approx(math.log(2), rel=0.1)


def test_learned_is_d_rows_whatever_the_noise_and_fewer_where_fewer_are_enough() -> None:
    for noise in (0.0, 0.01, 1.0):
        assert leakage(channel(noise, 64), 64).learned
    assert not leakage(channel(0.01), 200).learned
    # At the floor two columns share a row.
    half = leakage(channel(0.0), 128)
    assert half.learned
    assert half.error < 0.01 < LEARNED
    assert not half.exact


@pytest.mark.parametrize("error", [0.5, 0.1, 0.01, 0.0])
def test_rows_until_is_the_first_number_of_rows_that_gets_there(error: float) -> None:
    one = channel(0.03)
    rows = rows_until(one, error)

    def reached(count: int) -> bool:
        found = leakage(one, count)
        return found.exact if error == 0 else found.error <= error

    assert reached(rows)
    assert not reached(rows - 1)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="rows"):
        plan(channel(0.0), -1)
    for error in (-0.1, 1.0):
        with pytest.raises(ValueError, match="error"):
            rows_until(channel(0.0), error)


def test_noise_beyond_what_is_searched_says_so() -> None:
    loud = Channel(256, 2, core_rms(256), 4.5 * core_rms(256), Q / 3)
    with pytest.raises(OverflowError, match="no known way"):
        rows_until(loud, 0.0)
    assert 0 < leakage(loud, 256).error <= 1


def test_more_noise_and_fewer_rows_leave_more_error() -> None:
    by_noise = [leakage(channel(noise), 512).error for noise in (0.01, 0.03, 0.1, 0.3)]
    assert by_noise == sorted(by_noise)
    assert by_noise[0] < by_noise[-1]


def test_schemes_are_a_convex_hull() -> None:
    points = [(0.0, 1.0), *((one.rows, one.square) for one in schemes(channel(0.3)))]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(points)]
    assert all(slope < 0 for slope in slopes)
    assert slopes == sorted(slopes)


def test_averaging_on_the_circle() -> None:
    assert averaged_sigma(1000.0, 1) == 1000.0
    assert averaged_sigma(Q / 1000, 16) == pytest.approx(Q / 4000, rel=1e-3)
    # Wide noise: the mean of 1024 points on the circle, by simulation.
    sigma = Q / 5
    rng = np.random.default_rng(0)
    angles = np.angle(np.exp(2j * np.pi * sigma / Q * rng.standard_normal((1000, 1024))).mean(axis=1))
    assert averaged_sigma(sigma, 1024) == pytest.approx(angles.std() * Q / (2 * np.pi), rel=0.1)


def test_the_tail_bound_is_above_the_tail_and_near() -> None:
    z = np.linspace(0, 12, 100)
    exact = np.array([math.erfc(v / math.sqrt(2)) / 2 for v in z])
    assert (upper_tail(z) >= exact * (1 - 1e-12)).all()
    assert (upper_tail(z) <= exact * 1.15).all()


def test_the_peak_of_a_core() -> None:
    core = np.zeros((2, 100), dtype=np.int32)
    core[1, 7] = -10_000
    assert peak_ratio([core]) == pytest.approx(10_000 / core_rms(100))
