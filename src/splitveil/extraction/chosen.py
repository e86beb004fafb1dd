"""Chosen queries: a column a row, then the modular ladder; or several columns a row where there is hardly any noise.

The plan is that of ``private.columns``, which states the mathematics; this module carries it out against a server and
reads the answers. Protocol design, section 6.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from splitveil.extraction.client import Client, centred, residues
from splitveil.lattice.parameters import Q
from splitveil.lattice.randomness import secret_words
from splitveil.private.columns import Channel, Scheme, averaged_sigma, plan
from splitveil.private.core import core_rms

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
ASSUMED_PEAK = 6.0
"""Largest entry of a core in units of ρ/√d, which is published. Real adapters: 3.1 to 5.2."""
CONFIRMING_ROWS = 16
CONFIRMING_LIMIT = 3.0  # mean square residual in units of σ_g²; 16 rows exceed it by chance once in 20,000 times
_WINDOW = 7.0  # standard deviations of the first answer in which the integer is looked for
_AT_ONCE = 1 << 16  # candidates of a block of entries that are weighed together


@dataclass(frozen=True)
class Estimate:
    """A core as an attack believes it to be."""

    values: F64 = field(repr=False)
    """(rank, d) in integer units: means of what is possible, integers where one is far more likely than all others."""
    seen: NDArray[np.bool_] = field(repr=False)
    """(d,) columns that were asked for."""
    rows: int
    """Rows answered for this layer."""

    @property
    def integers(self) -> I64:
        """The nearest integer core."""
        return np.rint(self.values).astype(np.int64)


def assumed_peak(client: Client, layer: int) -> float:
    """The largest entry to be expected by an attacker who knows the publication alone, in units of c(d)."""
    published = client.layer(layer)
    return ASSUMED_PEAK * published.norm_bound / math.sqrt(published.width) / core_rms(published.width)


def chosen(client: Client, layer: int, rows: int, *, peak_ratio: float | None = None) -> Estimate:
    """What ``rows`` rows of chosen queries tell of a layer's core.

    ``peak_ratio`` is the attacker's guess at κ_c, by default ``assumed_peak``. Too low a guess makes answers wrap, and
    the estimate wrong; ``confirm`` notices.
    """
    published = client.layer(layer)
    channel = Channel.of(
        client.publication.parameters,
        published.width,
        published.rank,
        published.norm_bound,
        client.publication.noise,
        assumed_peak(client, layer) if peak_ratio is None else peak_ratio,
    )
    values = np.zeros((published.rank, published.width))
    seen = np.zeros(published.width, dtype=bool)
    first = 0
    for columns, scheme in plan(channel, rows).parts:
        part = np.arange(first, first + columns)
        if columns:
            ask = _packed if scheme.packed else _ladder
            values[:, part] = ask(client, layer, part, scheme, channel)
            seen[part] = True
        first += columns
    return Estimate(values, seen, client.rows[layer])


def confirm(client: Client, layer: int, integers: I64, rows: int = CONFIRMING_ROWS) -> bool:
    """Whether an integer core is exactly the served one, as a client can find out: by ``rows`` random queries mod q.

    A core that differs in a single entry predicts answers that are off by a uniform residue; the right one is off by
    g alone. Nothing is assumed of the core. Needs σ_g < q/8 or so, hence noise below √d/4 (as a fraction).
    """
    width, sigma = client.layer(layer).width, client.sigma(layer)
    queries = secret_words(rows * width).astype(np.uint32).reshape(rows, width)
    answers = client.ask(layer, queries)
    # Products of residues wrap around in 32-bit words, as the server's do.
    predicted = queries @ residues(integers).T
    rest = centred(residues(answers) - predicted).astype(np.float64) / sigma
    return bool(((rest**2).mean(axis=0) < CONFIRMING_LIMIT).all())


def _ladder(client: Client, layer: int, columns: NDArray[np.intp], scheme: Scheme, channel: Channel) -> F64:
    """Every column in several rows, one multiplier each: the most likely integers, (rank, columns)."""
    answers = []
    for multiplier in scheme.multipliers:
        repeated = [client.ask(layer, _one_hot(columns, multiplier, channel.width)) for _ in range(scheme.repeats)]
        answers.append(_averaged(np.stack(repeated)).T)
    stacked = np.stack(answers).reshape(len(scheme.multipliers), -1)
    sigma = averaged_sigma(channel.sigma, scheme.repeats)
    return decode(stacked, scheme.multipliers, sigma, channel).reshape(-1, len(columns))


def decode(answers: I64, multipliers: tuple[int, ...], sigma: float, channel: Channel) -> F64:
    """The integers C, |C| ≤ 1.5 peaks, behind answers k_p·C + g mod q, (multipliers, entries): their posterior means.

    The first multiplier does not wrap and gives a window; in it every integer is weighed by its likelihood under
    Gaussian g and by the prior N(0, c²).
    """
    coarse = answers[0] / multipliers[0]
    spread = sigma / multipliers[0]
    if len(multipliers) == 1 and spread > 2:
        # Nothing to unwrap, and integers say little: the mean of a Gaussian under a Gaussian prior.
        return np.asarray(coarse / (1 + (spread / channel.rms) ** 2), dtype=np.float64)
    reach = min(math.ceil(_WINDOW * spread) + 1, math.ceil(3 * channel.peak))
    # All in 32-bit words: products of residues wrap around as the server's do.
    offsets = np.arange(-reach, reach + 1, dtype=np.int32)
    words = residues(answers)
    out = np.empty(len(coarse))
    block = max(1, _AT_ONCE // len(offsets))
    for first in range(0, len(coarse), block):
        part = slice(first, first + block)
        candidates = np.rint(coarse[part]).astype(np.int32)[:, None] + offsets
        cost = np.square(candidates / np.float32(channel.rms))
        for word, multiplier in zip(words[:, part], multipliers, strict=True):
            rest = (word[:, None] - candidates.view(np.uint32) * np.uint32(multiplier)).view(np.int32)
            cost += np.square(rest * np.float32(1 / sigma))
        cost[np.abs(candidates) > 1.5 * channel.peak] = np.inf
        cost -= cost.min(axis=1, keepdims=True)
        weight = np.exp(cost * np.float32(-0.5))
        out[part] = np.einsum("ec,ec->e", weight, candidates, dtype=np.float64) / weight.sum(axis=1, dtype=np.float64)
    return out


def _packed(client: Client, layer: int, columns: NDArray[np.intp], scheme: Scheme, channel: Channel) -> F64:
    """Several columns in one row, as digits: all but the finest come back as integers, (rank, columns)."""
    group = len(scheme.multipliers)
    padded = np.resize(columns, -(-len(columns) // group) * group).reshape(-1, group)
    queries = np.zeros((len(padded), channel.width), dtype=np.uint32)
    taken = np.zeros(channel.width, dtype=bool)
    for digit, multiplier in enumerate(scheme.multipliers):
        # In a last row that is not full, columns would come twice; asked once, they are the last to be read.
        fresh = ~taken[padded[:, digit]]
        queries[np.flatnonzero(fresh), padded[fresh, digit]] = multiplier
        taken[padded[:, digit]] = True
    rest = client.ask(layer, queries).astype(np.float64)
    values = np.zeros((rest.shape[1], channel.width))
    for digit in range(group - 1, -1, -1):
        multiplier = scheme.multipliers[digit]
        asked = queries[np.arange(len(padded)), padded[:, digit]] == multiplier
        found = rest / multiplier
        if digit or channel.sigma / multiplier < 0.5:
            found = np.rint(found)
        found[~asked] = 0
        rest -= found * multiplier
        values[:, padded[asked, digit]] = found[asked].T
    return values[:, columns]


def _one_hot(columns: NDArray[np.intp], multiplier: int, width: int) -> NDArray[np.uint32]:
    queries = np.zeros((len(columns), width), dtype=np.uint32)
    queries[np.arange(len(columns)), columns] = multiplier
    return queries


def _averaged(answers: I64) -> I64:
    """The mean of answers (repeats, …) on the unit circle, as integers mod q."""
    if len(answers) == 1:
        single: I64 = answers[0]
        return single
    angle = np.angle(np.exp(2j * np.pi * (answers / Q)).mean(axis=0))
    mean: I64 = np.rint(angle / (2 * np.pi) * Q).astype(np.int64)
    return mean
