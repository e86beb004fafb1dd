"""An n-gram model over token ids: interpolated Kneser–Ney with three discounts an order (Chen and Goodman, 1999).

The baseline that the small neural models are held against. It is exact, not hashed: with a vocabulary of at most 4096
an n-gram of up to five tokens is one 64-bit integer, so counting is sorting and looking up is a binary search.

``Runs`` says how much of a text is copied: near-duplicates between training and held-out text flatter every model, and
an n-gram model most.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ORDER = 5
RUN = 16
TOKEN_BITS = 12
CONTEXT_SHIFT = np.uint64(TOKEN_BITS)

Keys = NDArray[np.uint64]
Counts = NDArray[np.int64]
Probabilities = NDArray[np.float64]


@dataclass(frozen=True)
class Level:
    """All n-grams of one order, and what their contexts leave to the order below."""

    grams: Keys  # sorted
    discounted: Probabilities  # (count − discount) / total of the context, one an n-gram
    contexts: Keys  # sorted
    backoff: Probabilities  # the mass that the discounts free, one a context

    def probability(self, grams: Keys, lower: Probabilities) -> Probabilities:
        """The interpolated probability of each n-gram's last token, given that of the order below."""
        found, at = look_up(self.grams, grams)
        own = np.where(found, self.discounted[at], 0.0)
        seen, at = look_up(self.contexts, grams >> CONTEXT_SHIFT)
        return own + np.where(seen, self.backoff[at], 1.0) * lower


def look_up(table: Keys, wanted: Keys) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
    """Which of ``wanted`` are in the sorted ``table``, and where (any valid index for those that are not)."""
    at = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return table[at] == wanted, at


def pad_starts(stream: NDArray[np.integer], start: int) -> NDArray[np.uint64]:
    """The stream with ``ORDER - 1`` start tokens before each document instead of one.

    So a document's first tokens are never predicted from the end of another document.
    """
    return np.repeat(stream, np.where(stream == start, ORDER - 1, 1)).astype(np.uint64)


def packed(tokens: NDArray[np.uint64], order: int) -> Keys:
    """The n-gram that ends at each position from ``order - 1`` on, as one integer, the last token in the low bits."""
    count = len(tokens) - order + 1
    keys = np.zeros(count, dtype=np.uint64)
    for i in range(order):
        keys <<= CONTEXT_SHIFT
        keys |= tokens[i : i + count]
    return keys


def count_sorted(keys: Keys) -> tuple[Keys, Counts]:
    """The distinct values of sorted keys and how often each occurs."""
    starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    return keys[starts], np.diff(np.append(starts, len(keys)))


def discounts(counts: Counts) -> NDArray[np.float64]:
    """What is taken off a count of 0, 1, 2, and 3 or more, estimated from the counts of counts."""
    n = np.bincount(np.minimum(counts, 5), minlength=6).astype(np.float64)
    if not n[1:5].all():
        return np.array([0.0, 0.5, 0.5, 0.5])  # too little text for the estimate
    y = n[1] / (n[1] + 2 * n[2])
    estimate = [k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)]
    # Never below 0.1: an order that frees nothing would give what it has not seen the probability 0.
    return np.array([0.0, *np.clip(estimate, 0.1, [1.0, 2.0, 3.0])])


def level(grams: Keys, counts: Counts) -> Level:
    """One order's tables from its distinct n-grams and their (raw or continuation) counts."""
    taken = discounts(counts)[np.minimum(counts, 3)]
    contexts, size = count_sorted(grams >> CONTEXT_SHIFT)
    starts = np.cumsum(size) - size
    totals = np.add.reduceat(counts, starts).astype(np.float64)
    freed = np.add.reduceat(taken, starts)
    return Level(grams, (counts - taken) / np.repeat(totals, size), contexts, freed / totals)


class NGram:
    """A model of order ``ORDER`` fitted on a stream of documents that each begin with ``start``."""

    def __init__(self, stream: NDArray[np.integer], *, start: int, vocabulary: int) -> None:
        if vocabulary > 1 << TOKEN_BITS:
            raise ValueError(f"vocabulary of {vocabulary}: at most {1 << TOKEN_BITS} fits the packed n-grams")
        self.start = start
        self.uniform = 1 / (vocabulary - 1)  # the start token is never predicted
        tokens = pad_starts(stream, start)
        keys = packed(tokens, ORDER)
        keys = np.sort(keys[tokens[ORDER - 1 :] != start])
        levels = [level(*count_sorted(keys))]
        for order in range(ORDER - 1, 0, -1):
            # Lower orders count in how many different ways an n-gram is preceded, not how often it occurs.
            suffixes = levels[-1].grams & np.uint64((1 << (TOKEN_BITS * order)) - 1)
            levels.append(level(*count_sorted(np.sort(suffixes))))
        self.levels = levels[::-1]

    def nats(self, document: NDArray[np.integer]) -> Probabilities:
        """Negative log-likelihood of each token of a document after its start token."""
        tokens = pad_starts(document, self.start)
        wanted = packed(tokens, ORDER)
        probability = np.full(len(wanted), self.uniform)
        for order, one in enumerate(self.levels, start=1):
            grams = wanted & np.uint64((1 << (TOKEN_BITS * order)) - 1)
            probability = one.probability(grams, probability)
        nats: Probabilities = -np.log(probability)
        return nats


class Runs:
    """Every run of ``RUN`` tokens of a stream, by its hash."""

    def __init__(self, stream: NDArray[np.integer]) -> None:
        self.known = np.unique(self.hashes(stream))

    @staticmethod
    def hashes(tokens: NDArray[np.integer]) -> Keys:
        """A polynomial hash of the run that begins at each position, modulo 2^64."""
        wide = tokens.astype(np.uint64) + np.uint64(1)
        count = max(0, len(tokens) - RUN + 1)
        keys = np.zeros(count, dtype=np.uint64)
        for i in range(RUN):
            keys = keys * np.uint64(0x9E3779B97F4A7C15) + wide[i : i + count]
        return keys

    def copied(self, document: NDArray[np.integer]) -> int:
        """How many of a document's tokens lie in a run that the stream holds too."""
        begins = np.flatnonzero(look_up(self.known, self.hashes(document))[0])
        change = np.zeros(len(document) + 1, dtype=np.int64)
        np.add.at(change, begins, 1)
        np.add.at(change, begins + RUN, -1)
        return int((np.cumsum(change) > 0).sum())
