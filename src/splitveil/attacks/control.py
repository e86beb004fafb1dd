"""The controls of every audit: two levels of chance, and the score of the truth itself."""

from collections.abc import Mapping

import torch
from torch import Tensor

from splitveil.attacks.attack import Effort, Progress, Recovery
from splitveil.attacks.knowledge import Access, Knowledge
from splitveil.split import Crossing


class Floor:
    """Samples from how often each token occurs in the shadow text; looks at the crossing's mask alone."""

    name = "floor"
    version = 1
    needs = frozenset({Access.SHADOW})
    source = "the level of chance"
    summary = "guesses without looking: tokens drawn as often as they occur in the attacker's own text"

    def fit(self, knowledge: Knowledge, effort: Effort, progress: Progress) -> None:
        self._seed = torch.tensor(effort.seed)
        self._counts = torch.bincount(knowledge.shadow.train.flatten(), minlength=knowledge.vocabulary).float()
        progress(1.0, "")

    def recover(self, crossing: Crossing, progress: Progress) -> Recovery:
        draw = torch.Generator().manual_seed(int(self._seed))
        tokens = torch.multinomial(self._counts, crossing.text.numel(), replacement=True, generator=draw)
        return Recovery(tokens.view(crossing.text.shape).masked_fill(~crossing.text, -1))

    def state(self) -> dict[str, Tensor]:
        return {"counts": self._counts, "seed": self._seed}

    def restore(self, state: Mapping[str, Tensor], knowledge: Knowledge) -> None:
        self._counts, self._seed = state["counts"], state["seed"]


class Commonest:
    """Says the commonest token of the shadow text everywhere: what an attacker falls back to that learnt nothing.

    Of all guesses that do not look, it scores highest, so that an attack above it has read something.
    """

    name = "floor:commonest"
    version = 1
    needs = frozenset({Access.SHADOW})
    source = "the level of chance"
    summary = "says the commonest token everywhere: the best guess without looking"

    def fit(self, knowledge: Knowledge, effort: Effort, progress: Progress) -> None:
        # A special token that every window begins with is no part of what is scored.
        self._token = torch.bincount(knowledge.shadow.train[:, 1:].flatten()).argmax()
        progress(1.0, "")

    def recover(self, crossing: Crossing, progress: Progress) -> Recovery:
        tokens = torch.full(crossing.text.shape, int(self._token))
        return Recovery(tokens.masked_fill(~crossing.text.cpu(), -1))

    def state(self) -> dict[str, Tensor]:
        return {"token": self._token}

    def restore(self, state: Mapping[str, Tensor], knowledge: Knowledge) -> None:
        self._token = state["token"]


class Ceiling:
    """Returns the prompts themselves: sent through the whole scoring path, they must score 1.0."""

    name = "oracle"
    version = 1
    needs = frozenset({Access.TRUTH})
    source = "the control of the scoring itself"
    summary = "the true prompts: if this is not 100 %, the report is invalid"

    def fit(self, knowledge: Knowledge, effort: Effort, progress: Progress) -> None:
        self._truth = knowledge.truth
        progress(1.0, "")

    def recover(self, crossing: Crossing, progress: Progress) -> Recovery:
        return Recovery(self._truth)

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: Mapping[str, Tensor], knowledge: Knowledge) -> None:
        self._truth = knowledge.truth
