"""Every sampler has the distribution it names, and takes its randomness from the operating system.

Chi-square tests, each with a false alarm once in 10^9 runs. Independence is tested on pairs: of neighbours, and of
values that a sampler makes from the same byte or word.
"""

import math
import os
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import chi2_contingency, chisquare, norm

from splitveil.lattice import randomness, sampling
from splitveil.private.core import haar_orthogonal

FALSE_ALARM = 1e-9
Values = NDArray[np.int64]


def fits(values: Values, probabilities: dict[int, float]) -> None:
    """The values are all among those listed, and as frequent as they should be; rare ones are pooled."""
    numbers = np.array(sorted(probabilities))
    expected = np.array([probabilities[number] for number in numbers.tolist()]) * len(values)
    assert np.isin(values, numbers).all()
    observed = np.bincount(np.searchsorted(numbers, values), minlength=len(numbers)).astype(np.float64)
    common = expected >= 20
    if not common.all():
        observed = np.append(observed[common], observed[~common].sum())
        expected = np.append(expected[common], expected[~common].sum())
    if expected[-1] < 5:  # a pool so rare that it is judged with its neighbour
        observed[-2:], expected[-2:] = observed[-2:].sum() / 2, expected[-2:].sum() / 2
    assert chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > FALSE_ALARM


def independent(values: Values, lag: int, classes: int = 5) -> None:
    """A value says nothing about the one ``lag`` places on, by a table of classes of about equal size."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, classes + 1)[1:-1]))
    labels = np.searchsorted(edges, values)
    labels -= labels.min()
    pairs = labels[: len(labels) - len(labels) % (2 * lag)].reshape(-1, 2, lag)  # disjoint, so that the counts are
    size = int(labels.max()) + 1
    table = np.bincount((pairs[:, 0] * size + pairs[:, 1]).ravel(), minlength=size**2).reshape(size, size)
    assert chi2_contingency(table).pvalue > FALSE_ALARM


def gaussian_mass(sigma: float) -> dict[int, float]:
    """The exact probabilities of the discrete Gaussian, cut at 10 σ."""
    bound = math.ceil(10 * sigma)
    mass = {x: math.exp(-(x**2) / (2 * sigma**2)) for x in range(-bound, bound + 1)}
    total = sum(mass.values())
    return {x: value / total for x, value in mass.items()}


def even(low: int, high: int) -> dict[int, float]:
    return dict.fromkeys(range(low, high + 1), 1 / (high - low + 1))


EXACT: list[tuple[str, Callable[[int], NDArray[np.integer]], dict[int, float]]] = [
    ("ternary", sampling.ternary, even(-1, 1)),
    ("centred binomial", sampling.centred_binomial_2, {x: math.comb(4, 2 + x) / 16 for x in range(-2, 3)}),
    ("uniform 1", lambda n: sampling.uniform(n, 1), even(-1, 1)),
    ("uniform 128", lambda n: sampling.uniform(n, 128), even(-128, 128)),
    ("uniform 886", lambda n: sampling.uniform(n, 886), even(-886, 886)),
    ("uniform 5000", lambda n: sampling.uniform(n, 5000), even(-5000, 5000)),  # wide enough to see a bias of % width
    ("Gaussian 1", lambda n: sampling.discrete_gaussian(n, 1.0), gaussian_mass(1.0)),
    ("Gaussian 2.5", lambda n: sampling.discrete_gaussian(n, 2.5), gaussian_mass(2.5)),
    ("Gaussian 256", lambda n: sampling.discrete_gaussian(n, 256.0), gaussian_mass(256.0)),
]


@pytest.mark.parametrize(("draw", "law"), [case[1:] for case in EXACT], ids=[case[0] for case in EXACT])
def test_distribution_and_independence(draw: Callable[[int], NDArray[np.integer]], law: dict[int, float]) -> None:
    values = draw(300_000).astype(np.int64)
    assert len(values) == 300_000
    fits(values, law)
    # Five trits come from one byte, two binomials too.
    for lag in (1, 2, 3, 4, 5):
        independent(values, lag)


@pytest.mark.parametrize("sigma", [1e6, 2.0**31, 2.0**39])
def test_wide_gaussians(sigma: float) -> None:
    values = sampling.discrete_gaussian(60_000, sigma)
    # At this width the sum over a class is the normal integral to about 1/σ².
    edges = np.rint(norm.ppf(np.linspace(0, 1, 102)[1:-1]) * sigma)
    mass = np.diff(norm.cdf((edges + 0.5) / sigma), prepend=0, append=1)
    observed = np.bincount(np.searchsorted(edges, values), minlength=len(mass))
    assert chisquare(observed, mass * len(values)).pvalue > FALSE_ALARM
    assert np.abs(values).max() < 7.5 * sigma
    assert np.abs(values).max() > 3 * sigma
    fits(values & 1, even(0, 1))
    independent(values, 1)


@pytest.mark.parametrize("sigma", [0.0, 0.99, -1.0, 2.0**40, math.nan, math.inf])
def test_a_gaussian_outside_the_range_is_refused(sigma: float) -> None:
    with pytest.raises(ValueError, match="outside"):
        sampling.discrete_gaussian(1, sigma)


def test_the_gaussian_is_cut_at_ten_sigma(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proposals beyond the cut are rejected even if the coin says yes."""
    words = np.zeros(2 * 8192, dtype=np.uint64)
    words[::2] = np.arange(8192)
    monkeypatch.setattr(sampling, "secret_words", lambda count: words)
    assert set(sampling.discrete_gaussian(5121, 256.0).tolist()) == set(range(-2560, 2561))


@pytest.mark.parametrize("count", [0, 1, 2, 4, 5, 7, 8, 9, 4097])
def test_as_many_as_asked_for(count: int) -> None:
    for _, draw, _ in EXACT:
        assert draw(count).shape == (count,)
    assert randomness.secret_normals(count).shape == (count,)
    assert randomness.secret_bytes(count).shape == (count,)


def test_large_draws_take_little_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = sampling.secret_words
    monkeypatch.setattr(sampling, "secret_words", lambda count: sizes.append(count) or real(count))
    assert sampling.discrete_gaussian(150_000, 256.0).std() == pytest.approx(256, rel=0.02)
    assert len(sizes) > 1
    assert max(sizes) <= 2 * sampling.MAX_DRAWS


# Real numbers: for the gauge only.


def test_secret_uniforms_lie_strictly_between_0_and_1(monkeypatch: pytest.MonkeyPatch) -> None:
    for word in (0, 2**64 - 1):
        words = np.array([word], dtype=np.uint64)
        monkeypatch.setattr(randomness, "secret_words", lambda count, key=None, words=words: words.repeat(count))
        assert 0 < randomness.secret_uniforms(1)[0] < 1
        assert np.isfinite(randomness.secret_normals(3)).all()


def test_secret_normals() -> None:
    count = 200_000
    values = randomness.secret_normals(count)
    classes = np.floor(norm.cdf(values) * 100).astype(np.int64)
    fits(classes, even(0, 99))
    independent(classes, 1)
    # Box–Muller makes two values of one radius and one angle; they lie half the array apart.
    independent(classes, count // 2)
    radius = values[: count // 2] ** 2 + values[count // 2 :] ** 2
    fits(np.floor(np.exp(-radius / 2) * 50).astype(np.int64), even(0, 49))


@pytest.mark.parametrize("size", [1, 2, 3, 8, 64])
def test_gauges_are_orthogonal(size: int) -> None:
    matrix = haar_orthogonal(size)
    assert np.abs(matrix @ matrix.T - np.eye(size)).max() < 1e-13


def test_gauges_are_haar_distributed() -> None:
    """For Haar Q in three dimensions uᵀQv is uniform on [−1, 1], for any unit vectors u and v (Archimedes)."""
    matrices = np.array([haar_orthogonal(3) for _ in range(12_000)])
    unit = np.eye(3)
    skew = np.array([2, -1, 2]) / 3
    for u, v in ((unit[0], unit[0]), (unit[2], unit[2]), (unit[0], unit[2]), (unit[1], unit[0]), (skew, skew)):
        entries = np.einsum("i,nij,j->n", u, matrices, v)
        fits(np.floor((entries + 1) * 10).astype(np.int64), even(0, 19))
    fits((np.linalg.det(matrices) > 0).astype(np.int64), even(0, 1))
    # The trace of a rotation by φ is 1 + 2 cos φ, and φ has density (1 − cos φ)/π on [0, π].
    trace = np.einsum("nii->n", matrices) * np.sign(np.linalg.det(matrices))
    angle = np.arccos(np.clip((trace - 1) / 2, -1, 1))
    fits(np.floor((angle - np.sin(angle)) / np.pi * 20).astype(np.int64), even(0, 19))


@pytest.mark.parametrize("size", [1, 2, 6])
def test_moments_and_signs_of_gauges(size: int) -> None:
    matrices = np.array([haar_orthogonal(size) for _ in range(4000)])
    count = len(matrices)
    # Entries of one matrix are dependent, so each place is tested by itself: E q² = 1/n, E q⁴ = 3/(n(n + 2)).
    variance = 3 / (size * (size + 2)) - 1 / size**2
    assert np.abs((matrices**2).mean(axis=0) - 1 / size).max() <= 6.5 * math.sqrt(variance / count) + 1e-12
    assert (matrices**4).mean() == pytest.approx(3 / (size * (size + 2)), rel=0.1)
    for place in np.moveaxis(matrices, 0, -1).reshape(size * size, count):
        fits((place > 0).astype(np.int64), even(0, 1))


# Where the randomness comes from.

RFC_8439_ZERO_KEY = "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7da41597c5157488d7724e03fb8d84a37"


def test_secret_bytes_are_a_chacha20_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC 8439, appendix A.1, test vector 1: key, nonce and counter zero."""
    monkeypatch.setattr(os, "urandom", bytes)
    expected = bytes.fromhex(RFC_8439_ZERO_KEY)
    assert randomness.secret_bytes(len(expected)).tobytes() == expected
    assert randomness.secret_bytes(7).tobytes() == expected[:7]
    assert randomness.secret_words(2).tobytes() == expected[:16]


def test_every_call_takes_a_fresh_key_from_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = os.urandom
    monkeypatch.setattr(os, "urandom", lambda size: asked.append(size) or real(size))
    for _ in range(3):
        randomness.secret_bytes(1000)
    assert asked == [32] * 3


def test_secret_bytes_look_random() -> None:
    values = randomness.secret_bytes(400_000).astype(np.int64)
    fits(values, even(0, 255))
    for lag in (1, 2, 4, 64):
        independent(values, lag, classes=16)


DRAWS: list[Callable[[], NDArray[np.generic]]] = [
    lambda: randomness.secret_bytes(40),
    lambda: randomness.secret_normals(40),
    lambda: sampling.ternary(200),
    lambda: sampling.centred_binomial_2(200),
    lambda: sampling.uniform(40, 128),
    lambda: sampling.discrete_gaussian(40, 256.0),
    lambda: haar_orthogonal(8),
]


@pytest.mark.parametrize("draw", DRAWS)
def test_two_calls_differ(draw: Callable[[], NDArray[np.generic]]) -> None:
    assert not np.array_equal(draw(), draw())


def test_public_elements_differ_in_every_argument() -> None:
    base = (bytes(16), bytes(32), 64, 0, 16)
    changes = [(b"\1" + bytes(15), *base[1:]), (base[0], b"\1" + bytes(31), *base[2:])]
    changes += [(*base[:2], 65, 0, 16), (*base[:2], 64, 1, 16)]
    streams = [randomness.public_element(*arguments).tobytes() for arguments in (base, *changes)]
    assert len(set(streams)) == len(streams)
    longer = randomness.public_element(*base[:4], 32)
    assert longer[:16].tobytes() != streams[0], "the degree must be hashed too"


def test_public_elements_look_uniform() -> None:
    words = np.concatenate([randomness.public_element(bytes(16), bytes(32), 9, i, 2048) for i in range(40)])
    fits(words.view(np.uint8).astype(np.int64), even(0, 255))
    independent(words.view(np.uint8).astype(np.int64), 1, classes=16)
