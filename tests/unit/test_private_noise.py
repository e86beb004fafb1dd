"""The noise of answers: as wide as published, fresh for every answer, never handed out twice."""

import copy
import math
import pickle
import threading

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import chisquare, norm

from splitveil.lattice.parameters import DEFAULT, INSECURE_TEST
from splitveil.private import noise as noise_module
from splitveil.private.bound import budget
from splitveil.private.core import LayerSpec
from splitveil.private.lattice_served import LatticeServed, publish
from splitveil.private.noise import BLOCK, AnswerNoise
from splitveil.private.published import Publication

FALSE_ALARM = 1e-9
WEIGHTS = np.random.default_rng(0).standard_normal((4, 30)).astype(np.float32)


def served(noise: float) -> tuple[LatticeServed, Publication]:
    return publish([LayerSpec(WEIGHTS, None, 1.0, (("m", 4),))], noise=noise, parameters=INSECURE_TEST)


def answers_to(half: LatticeServed, row: NDArray[np.uint32], rows: int) -> NDArray[np.int32]:
    """Answers to ``rows`` equal queries, in one message."""
    data = half.answer([0], rows, np.tile(row, rows).astype("<u4").tobytes())
    return np.frombuffer(data, dtype="<i4").reshape(rows, 4)


@pytest.mark.parametrize("noise", [0.0, 1e-8, 0.01, 0.3, 10.0])
def test_answers_have_the_published_noise(noise: float) -> None:
    """The answer to the query 0 is the noise itself."""
    half, publication = served(noise)
    values = answers_to(half, np.zeros(62, dtype=np.uint32), 5000).astype(np.float64).ravel()
    sigma = budget(INSECURE_TEST, 30, publication.layers[0].norm_bound, publication.noise).answer_sigma
    assert sigma >= DEFAULT.answer_sigma
    assert abs((values**2).mean() / sigma**2 - 1) < 6.2 * math.sqrt(2 / len(values))
    edges = norm.ppf(np.linspace(0, 1, 41)[1:-1]) * sigma
    mass = np.diff(norm.cdf((np.floor(edges) + 0.5) / sigma), prepend=0, append=1)
    observed = np.bincount(np.searchsorted(np.floor(edges) + 0.5, values), minlength=40)
    assert chisquare(observed, mass * len(values)).pvalue > FALSE_ALARM


def test_equal_queries_get_fresh_noise_within_a_message_and_across() -> None:
    half, publication = served(0.3)
    row = np.arange(62, dtype=np.uint32) * 7919
    first, second = answers_to(half, row, 500), answers_to(half, row, 500)
    assert len({bytes(values) for values in np.vstack([first, second])}) == 1000
    sigma = budget(INSECURE_TEST, 30, publication.layers[0].norm_bound, publication.noise).answer_sigma
    difference = (first - second).astype(np.float64)
    assert (difference**2).mean() / 2 / sigma**2 == pytest.approx(1, abs=6.2 * math.sqrt(2 / 2000))


def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value drawn is one more than the one before."""
    lock, start = threading.Lock(), [0]

    def draw(count: int, sigma: float) -> NDArray[np.int64]:
        with lock:
            first, start[0] = start[0], start[0] + count
        return np.arange(first, first + count)

    monkeypatch.setattr(noise_module, "discrete_gaussian", draw)


def test_threads_never_get_the_same_value(monkeypatch: pytest.MonkeyPatch) -> None:
    counting(monkeypatch)
    source, taken = AnswerNoise(256.0), [[] for _ in range(8)]  # type: tuple[AnswerNoise, list[list[int]]]

    def take(mine: list[int]) -> None:
        for i in range(300):
            mine.extend(source.take(1 + i % 3, 5).ravel().tolist())

    threads = [threading.Thread(target=take, args=(mine,)) for mine in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    values = [value for mine in taken for value in mine]
    assert len(values) == 8 * 300 * 10
    assert len(set(values)) == len(values)


@pytest.mark.parametrize("count", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_large_takes(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    counting(monkeypatch)
    source = AnswerNoise(256.0)
    values = [source.take(1, count) for _ in range(3)]
    assert [v.shape for v in values] == [(1, count)] * 3
    assert len(np.unique(np.hstack(values))) == 3 * count


def test_what_was_handed_out_may_be_written_to() -> None:
    source = AnswerNoise(256.0)
    first = source.take(2, 3)
    first[:] = 0
    assert not np.shares_memory(first, source.take(2, 3))
    assert not np.shares_memory(first, source._values)


def test_noise_is_neither_copied_nor_pickled() -> None:
    """A shallow copy would hand out the same values again."""
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="neither copied nor pickled"):
            attempt(AnswerNoise(256.0))  # type: ignore[operator]
