"""``gradient``: what a training device sends back names the next token; what it sent forward names the token itself.

In the line of BiSR (Luo et al., CCS 2025), forward inversion refined by gradient matching. There the match is sought by
gradient descent on soft labels; here the labels of a position are the vocabulary, and its entries are compared.

A device that keeps head and labels to itself (U shape) still returns the gradient of its loss by the hidden states that
the cloud gave it. Each position's gradient points where the head would have had the state go for the one token that
followed (``matching``). It does so whatever was done to the states on their way up: the cloud knows what it returned.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from splitveil.attacks.attack import Effort, Progress, Recovery
from splitveil.attacks.knowledge import Access, Knowledge
from splitveil.attacks.learning import Curve
from splitveil.attacks.matching import Head, Matcher, gradient_of, unit
from splitveil.attacks.mlp import Mlp
from splitveil.attacks.samples import Samples
from splitveil.errors import ConfigurationError, NonFiniteError
from splitveil.split import Crossing

READ = 8
"""The reader's likeliest tokens, which are candidates too."""
CHUNK = 512
"""Positions judged at a time."""
BATCH = 32
"""Prompts that go through the cloud half at a time."""
LEARNING = 0.85
"""The reader's share of the time."""
WINDOWS, POSITIONS = 16, 192
"""Shadow text for calibration: windows, and positions of them."""
LEVELS = (0.0, 0.1, 0.3, 0.6, 1.0, 1.5, 3.0, math.inf, math.inf)
"""How wrong the gradients of calibration are made, relative to their own size: a head that the attacker does not know
exactly, or noise. The last are noise alone."""
BINS = 16
WEIGHTS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
READER = "reader."
ABSENT = (
    "no gradients cross here: the attack 'gradient' needs texts that are being trained on; give --training "
    "(training=True)"
)


class Reader(Mlp):
    """A per-position inverter that says how sure it is."""

    @torch.no_grad()
    def scores(self, states: Tensor) -> Tensor:
        """(states, vocabulary) log-probabilities for states (states, width)."""
        found: Tensor = self._net(states).log_softmax(-1)
        return found


class Gradient:
    """Forward inversion and gradient matching, each weighed by how well it does on text of the attacker's own.

    For each position: candidates from both sides, judged by the reader's log-probability plus a weight times the cosine
    between the candidate's gradient and the one that crossed. The weight depends on how near the best candidate comes:
    calibration spoils gradients of shadow text to different degrees, and finds the weights under which the truth is
    likeliest. Where the match is as poor as chance makes it, the weight is small, and the reader decides.

    ``recover`` reports for each position that a gradient speaks of, so for all but a text's first:

    - ``distance``: between the directions of the gradient that crossed and of the returned token's, from 0 to 2;
    - ``gap``: the same of the nearest other candidate, minus ``distance``; negative where the reader overruled.
    """

    name = "gradient"
    version = 1
    needs = frozenset({Access.QUERIES, Access.SHADOW, Access.HEAD, Access.CLOUD})
    source = "in the line of BiSR (Luo et al., CCS 2025): forward inversion, then gradient matching"
    summary = "names each token by the gradient that a training device returns for the position before it"

    def fit(self, knowledge: Knowledge, effort: Effort, progress: Progress) -> None:
        """Raises ``ConfigurationError`` at once where no gradients cross."""
        if not knowledge.gradients:
            raise ConfigurationError(ABSENT)
        self._knowledge = knowledge
        self._reader = Reader()
        self._reader.fit(knowledge, replace(effort, seconds=effort.seconds * LEARNING), progress)
        self._calibrate(effort, progress)

    def recover(self, crossing: Crossing, progress: Progress) -> Recovery:
        """Raises ``ConfigurationError`` for a crossing without gradients, ``NonFiniteError`` for NaN or infinity."""
        gradient = crossing.gradient
        if gradient is None:
            raise ConfigurationError(ABSENT)
        if not bool(gradient.isfinite().all()):
            raise NonFiniteError("a gradient that crossed is NaN or infinite")
        states = self._returned(crossing)
        text = crossing.text
        before = _before(text) & (gradient.roll(1, 1).abs().amax(-1) > 0)
        tokens = torch.full(text.shape, -1)
        tokens[text] = torch.cat([self._read(part) for part in torch.split(crossing.hidden[text], CHUNK)])
        facts = {name: torch.full(text.shape, math.nan) for name in ("distance", "gap")}
        found = []
        places = torch.split(before.nonzero(), CHUNK) if bool(before.any()) else ()
        for done, where in enumerate(places, 1):
            row, position = where.T
            known = self._compare(
                crossing.hidden[row, position], states[row, position - 1], gradient[row, position - 1]
            )
            found.append(self._decide(*known))
            progress(done / len(places), "")
        if found:
            for into, values in zip((tokens, *facts.values()), zip(*found, strict=True), strict=True):
                into[before] = torch.cat(values)
        return Recovery(tokens, facts)

    @property
    def curve(self) -> Curve:
        """Of the reader's validations while learning."""
        return self._reader.curve

    def state(self) -> dict[str, Tensor]:
        kept = {READER + name: tensor for name, tensor in self._reader.state().items()}
        return kept | {"lengths": self._matcher.lengths, "edges": self._edges, "weights": self._weights}

    def restore(self, state: Mapping[str, Tensor], knowledge: Knowledge) -> None:
        self._knowledge = knowledge
        self._reader = Reader()
        mine = {name[len(READER) :]: tensor for name, tensor in state.items() if name.startswith(READER)}
        self._reader.restore(mine, knowledge)
        self._matcher = Matcher(knowledge.head, knowledge.vocabulary, state["lengths"])
        self._edges, self._weights = state["edges"], state["weights"]

    def _calibrate(self, effort: Effort, progress: Progress) -> None:
        """Finds what a match of a given quality is worth beside the reader, on validation text."""
        knowledge = self._knowledge
        draw = torch.Generator().manual_seed(effort.seed)
        tokens, crossing = Samples(knowledge, effort.seed + 1).validation()
        # Half of them as they are, half with random tokens in them.
        few = torch.linspace(0, len(tokens) - 1, min(WINDOWS, len(tokens))).long()
        tokens, crossing = tokens[few], Crossing(crossing.hidden[few], crossing.mask[few])
        states = self._returned(crossing)
        self._matcher = Matcher(knowledge.head, knowledge.vocabulary)
        pairs = torch.cartesian_prod(torch.arange(len(tokens)), torch.arange(1, tokens.shape[1]))
        pairs = pairs[torch.randperm(len(pairs), generator=draw)[:POSITIONS]]
        row, position = pairs.T
        truth, after, returned = tokens[row, position], crossing.hidden[row, position], states[row, position - 1]
        self._matcher.measure(returned, draw)
        judged = []
        for number, level in enumerate(LEVELS, 1):
            spoilt = _spoilt(knowledge.head, returned, truth, level, draw)
            candidates, reader, away = self._compare(after, returned, spoilt)
            among = (candidates == truth[:, None]).any(1)
            where = (candidates == truth[:, None]).float().argmax(1)
            judged.append((reader[among], away[among], where[among]))
            progress(1.0, f"calibrating {number}/{len(LEVELS)}")
        reader, away, where = (torch.cat(parts) for parts in zip(*judged, strict=True))
        best = away.min(1).values
        self._edges = best.quantile(torch.arange(1, BINS) / BINS) if len(best) else torch.zeros(0)
        self._weights = torch.zeros(len(self._edges) + 1)
        bins = torch.bucketize(best, self._edges)
        for index in range(len(self._weights)):
            mine = bins == index
            if bool(mine.any()):
                losses = [
                    functional.cross_entropy(_judgement(reader[mine], away[mine], weight), where[mine]).item()
                    for weight in WEIGHTS
                ]
                self._weights[index] = WEIGHTS[losses.index(min(losses))]

    def _compare(self, after: Tensor, returned: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Candidates for the tokens at some positions: (n, k) ids, the reader's log-probabilities, and distances.

        ``after`` (n, crossing's width) are the states that crossed for those tokens; ``returned`` (n, width) what the
        cloud returned for the tokens before, and ``gradients`` (n, width) what came back for that. A candidate that is
        there twice has log-probability -∞ the second time.
        """
        scores = self._reader.scores(after)
        read = scores.topk(min(READ, scores.shape[1]), dim=1).indices
        candidates = torch.cat([read, self._matcher.candidates(returned, gradients)], 1)
        away = self._matcher.distances(returned, gradients, candidates)
        again = torch.ones(candidates.shape[1], candidates.shape[1], dtype=torch.bool).tril(-1)
        twice = ((candidates[:, :, None] == candidates[:, None]) & again).any(2)
        return candidates, scores.gather(1, candidates).masked_fill(twice, -math.inf), away.masked_fill(twice, 2.0)

    def _decide(self, candidates: Tensor, reader: Tensor, away: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n,) tokens, their distances, and their gaps."""
        weight = self._weights[torch.bucketize(away.min(1).values, self._edges)]
        chosen = _judgement(reader, away, weight[:, None]).argmax(1, keepdim=True)
        distance = away.gather(1, chosen)[:, 0]
        other = away.masked_fill(reader == -math.inf, math.inf).scatter(1, chosen, math.inf).min(1).values
        return candidates.gather(1, chosen)[:, 0], distance, other - distance

    @torch.no_grad()
    def _returned(self, crossing: Crossing) -> Tensor:
        """(batch, position, width) what the cloud returned to the device for this crossing."""
        return torch.cat(
            [
                self._knowledge.cloud(crossing.rows(start, start + BATCH))
                for start in range(0, len(crossing.mask), BATCH)
            ]
        )

    def _read(self, states: Tensor) -> Tensor:
        return self._reader.scores(states).argmax(1)


def _judgement(reader: Tensor, away: Tensor, weight: Tensor | float) -> Tensor:
    """(n, k): the cosine of two directions is 1 − distance² / 2."""
    return reader + weight * (1 - away.square() / 2)


def _before(text: Tensor) -> Tensor:
    """(batch, position) of bool: text that another position of text precedes."""
    found = torch.zeros_like(text)
    found[:, 1:] = text[:, 1:] & text[:, :-1]
    return found


def _spoilt(head: Head, states: Tensor, tokens: Tensor, level: float, draw: torch.Generator) -> Tensor:
    """Gradients (n, width) of ``tokens`` with an error of ``level`` times their size; of ∞, nothing else.

    Every other one has noise on it; the others are as from another head, one that sees each state elsewhere.
    """
    if level == math.inf:
        return torch.randn(states.shape, generator=draw)
    size = states.square().mean(1, keepdim=True).sqrt()
    elsewhere = states + level * size * torch.randn(states.shape, generator=draw)
    noise = torch.randn(states.shape, generator=draw) / math.sqrt(states.shape[1])
    exact, other = unit(gradient_of(head, states, tokens)), gradient_of(head, elsewhere, tokens)
    noisy = torch.arange(len(states)) % 2 == 0
    return torch.where(noisy[:, None], exact + level * noise, other)
