"""``beam``: ``revert``'s readings of each state, and the text among them that the public base finds likely.

Whoever knows which public model a device began with has a language model of its own text: better than what ``revert``'s
second stage learns from the attacker's. Readings leave several words possible at many positions; a beam search over
whole texts weighs how well each was read against how likely it is (noisy-channel decoding). Where the device half is
the public one, ``search`` does better. This is the attack for where ``search`` has nothing exact to compare with, as
against a personal part that the attacker lacks. In strong noise ``revert``'s second stage is worth more than the prior.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from splitveil.attacks.attack import Effort, Progress, Recovery
from splitveil.attacks.knowledge import Access, Knowledge, Prior
from splitveil.attacks.revert import SAY, Inverter, Revert
from splitveil.split import Crossing

CANDIDATES = 16
"""Readings of a position that are followed."""
BEAMS = 8
PROMPTS = 32
"""Victims searched at a time."""
WEIGHTS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5)
"""Of the prior; the one is taken that reads the attacker's own validation text best, of equals the smallest."""
READ = 8
"""Texts read at a time: scores of a whole vocabulary at every position are large."""
VALIDATION = 24
"""Windows of that text."""


class Beam:
    """Learns what ``revert`` learns, and how much the prior is worth beside it."""

    name = "beam"
    version = 10 * Revert.version + 1
    needs = Revert.needs | {Access.PRIOR}
    source = "noisy-channel decoding over the readings of arXiv 2501.05965"
    summary = "`revert`'s readings, and the likeliest text among them by the public base model"

    def __init__(self) -> None:
        self.learner = Revert()

    def fit(self, knowledge: Knowledge, effort: Effort, progress: Progress) -> None:
        self.learner.fit(knowledge, effort, progress)
        self.prepare(knowledge)

    def recover(self, crossing: Crossing, progress: Progress) -> Recovery:
        found, prompts = [], len(crossing.mask)
        for start in range(0, prompts, PROMPTS):
            part = crossing.rows(start, start + PROMPTS)
            read = likeliest(lambda some: readings(self.learner.net, some), part)
            found.append(beam_search(self._prior, read, part.text, self.weight))
            progress(min(1.0, (start + PROMPTS) / prompts), f"prior's weight {self.weight:g}")
        return Recovery(torch.cat(found).masked_fill(~crossing.text, -1))

    def state(self) -> dict[str, Tensor]:
        return self.learner.state()

    def restore(self, state: Mapping[str, Tensor], knowledge: Knowledge) -> None:
        self.learner.restore(state, knowledge)
        self.prepare(knowledge)

    def prepare(self, knowledge: Knowledge) -> None:
        self._prior = knowledge.prior
        tokens = knowledge.shadow.validation[:VALIDATION]
        found = likeliest(lambda part: readings(self.learner.net, part), knowledge.oracle(tokens))
        self.weight = best_weight(self._prior, found, tokens)


@torch.no_grad()
def readings(net: Inverter, crossing: Crossing) -> Tensor:
    """(prompts, positions, vocabulary) log-scores of stage 1 and the single states' reader, weighed as in ``revert``.

    Stage 2 is left out: it has a language model of its own, and would count language twice.
    """
    text = None if bool(crossing.text.all()) else crossing.text
    points = net.project(crossing.hidden, text)[1]
    return net.scores(points).log_softmax(-1) + SAY * net.alone(crossing.hidden).log_softmax(-1)


@dataclass(frozen=True, repr=False)
class Readings:
    """The likeliest readings of every position, the best first."""

    scores: Tensor
    """(prompts, positions, candidates) log-scores."""
    tokens: Tensor
    """(prompts, positions, candidates) token ids."""

    @classmethod
    def of(cls, scores: Tensor, candidates: int = CANDIDATES) -> "Readings":
        """The best of ``scores`` (prompts, positions, vocabulary)."""
        return cls(*scores.topk(min(candidates, scores.shape[2])))

    def parts(self, size: int) -> Iterator["Readings"]:
        """So many prompts at a time."""
        for scores, tokens in zip(torch.split(self.scores, size), torch.split(self.tokens, size), strict=True):
            yield Readings(scores, tokens)


@torch.no_grad()
def likeliest(reader: Callable[[Crossing], Tensor], crossing: Crossing) -> Readings:
    """What ``reader``, which gives log-scores of a whole vocabulary, reads; few prompts at a time, to bound memory."""
    found = [Readings.of(reader(crossing.rows(start, start + READ))) for start in range(0, len(crossing.mask), READ)]
    return Readings(torch.cat([one.scores for one in found]), torch.cat([one.tokens for one in found]))


def best_weight(prior: Prior, read: Readings, tokens: Tensor) -> float:
    """The prior's weight with which readings of the texts ``tokens``, without padding, come out best."""
    text = torch.ones_like(tokens, dtype=torch.bool)
    right = [int((beam_search(prior, read, text, weight) == tokens).sum()) for weight in WEIGHTS]
    return WEIGHTS[right.index(max(right))]


@torch.no_grad()
def beam_search(prior: Prior, read: Readings, text: Tensor, weight: float, beams: int = BEAMS) -> Tensor:
    """(prompts, positions) token ids: for each prompt the text whose log-probability as it was read, plus ``weight``
    times the prior's, is highest among those that were followed.

    ``text`` (prompts, positions) says where there is any, on whichever side it is padded.
    """
    parts = zip(read.parts(PROMPTS), torch.split(text, PROMPTS), strict=True)
    return torch.cat([_searched(prior, some, there, weight, beams) for some, there in parts])


def _searched(prior: Prior, readings_there: Readings, text: Tensor, weight: float, beams: int) -> Tensor:
    # Texts are moved to the left, so that all of them begin together.
    order = (~text).long().argsort(dim=1, stable=True)
    at = order[:, :, None].expand_as(readings_there.scores)
    read, tokens, there = (
        readings_there.scores.gather(1, at),
        readings_there.tokens.gather(1, at),
        text.gather(1, order),
    )
    prompts, positions, _ = read.shape
    totals, found = read[:, 0, :beams], tokens[:, 0, :beams, None]
    cache = prior.new_cache()
    for position in range(1, positions):
        followed = totals.shape[1]
        likely = prior(found[:, :, -1].reshape(-1, 1), cache).view(prompts, followed, -1)
        here = tokens[:, position]
        step = read[:, position, None] + weight * likely.gather(2, here[:, None].expand(-1, followed, -1))
        # Behind the end nothing is judged, and every beam goes on as itself.
        ended = torch.full_like(step, -torch.inf)
        ended[:, :, 0] = 0
        every = (totals[:, :, None] + torch.where(there[:, position, None, None], step, ended)).flatten(1)
        totals, best = every.topk(min(beams, every.shape[1]))
        parents, choice = best // step.shape[2], best % step.shape[2]
        prior.reorder(cache, (torch.arange(prompts, device=best.device)[:, None] * followed + parents).flatten())
        before = found.gather(1, parents[:, :, None].expand(-1, -1, found.shape[2]))
        found = torch.cat([before, here.gather(1, choice)[:, :, None]], 2)
    return torch.zeros_like(order).scatter(1, order, found[:, 0])
