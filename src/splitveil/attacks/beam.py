"""``beam``: ``revert``'s readings of each state, and the text among them that the public base finds likely.

Whoever knows which public model a device began with has a language model of its own text: better than what ``revert``'s
second stage learns from the attacker's. Readings leave several words possible at many positions; a beam search over
whole texts weighs how well each was read against how likely it is (noisy-channel decoding). Where the device half is
the public one, ``search`` does better. This is the attack for where ``search`` has nothing exact to compare with:
noise, and a personal part that the attacker lacks.
"""

from collections.abc import Mapping

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
        """What it learns is this attack's, and is kept as such: the two never learn the same twice."""

    def fit(self, knowledge: Knowledge, effort: Effort, progress: Progress) -> None:
        self.learner.fit(knowledge, effort, progress)
        self._choose(knowledge)

    def recover(self, crossing: Crossing, progress: Progress) -> Recovery:
        found, prompts = [], len(crossing.mask)
        for start in range(0, prompts, PROMPTS):
            part = crossing.rows(start, start + PROMPTS)
            found.append(beam_search(self._prior, readings(self.learner.net, part), part.text, self.weight))
            progress(min(1.0, (start + PROMPTS) / prompts), f"prior's weight {self.weight:g}")
        return Recovery(torch.cat(found).masked_fill(~crossing.text, -1))

    def state(self) -> dict[str, Tensor]:
        return self.learner.state()

    def restore(self, state: Mapping[str, Tensor], knowledge: Knowledge) -> None:
        self.learner.restore(state, knowledge)
        self._choose(knowledge)

    def _choose(self, knowledge: Knowledge) -> None:
        self._prior = knowledge.prior
        tokens = knowledge.shadow.validation[:VALIDATION]
        self.weight = best_weight(self._prior, readings(self.learner.net, knowledge.oracle(tokens)), tokens)


@torch.no_grad()
def readings(net: Inverter, crossing: Crossing) -> Tensor:
    """(prompts, positions, vocabulary) log-scores of stage 1 and the single states' reader, weighed as in ``revert``.

    Stage 2 is left out: it has a language model of its own, and would count language twice.
    """
    text = None if bool(crossing.text.all()) else crossing.text
    points = net.project(crossing.hidden, text)[1]
    return net.scores(points).log_softmax(-1) + SAY * net.alone(crossing.hidden).log_softmax(-1)


def best_weight(prior: Prior, scores: Tensor, tokens: Tensor) -> float:
    """The prior's weight with which the readings ``scores`` of the texts ``tokens``, without padding, come out best."""
    text = torch.ones_like(tokens, dtype=torch.bool)
    right = [int((beam_search(prior, scores, text, weight) == tokens).sum()) for weight in WEIGHTS]
    return WEIGHTS[right.index(max(right))]


@torch.no_grad()
def beam_search(
    prior: Prior, scores: Tensor, text: Tensor, weight: float, candidates: int = CANDIDATES, beams: int = BEAMS
) -> Tensor:
    """(prompts, positions) token ids: for each prompt the text whose log-probability as it was read, ``scores``
    (prompts, positions, vocabulary), plus ``weight`` times the prior's is highest among those that were followed.

    ``text`` (prompts, positions) says where there is any, on whichever side it is padded.
    """
    parts = zip(torch.split(scores, PROMPTS), torch.split(text, PROMPTS), strict=True)
    return torch.cat([_searched(prior, some, there, weight, candidates, beams) for some, there in parts])


def _searched(prior: Prior, scores: Tensor, text: Tensor, weight: float, candidates: int, beams: int) -> Tensor:
    read, tokens = scores.topk(min(candidates, scores.shape[2]))
    # Texts are moved to the left, so that all of them begin together.
    order = (~text).long().argsort(dim=1, stable=True)
    at = order[:, :, None].expand_as(read)
    read, tokens, there = read.gather(1, at), tokens.gather(1, at), text.gather(1, order)
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
