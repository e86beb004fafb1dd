"""``lens``: the model's own output head, applied too early (logit lens)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from splitveil.attacks.attack import Effort, Progress, Recovery
from splitveil.attacks.knowledge import Access, Knowledge
from splitveil.split import Crossing

CHUNK = 8
"""Prompts at a time: logits of a whole vocabulary take memory."""
TRIALS = 32
"""Shadow windows that decide how the head is read."""


class Lens:
    """Reads each state with the final norm and the head.

    Near the embeddings a state names its own token; near the end it names the next one. A few texts of the attacker's
    own decide which of the two readings is better at this cut.
    """

    name = "lens"
    version = 1
    needs = frozenset({Access.HEAD, Access.QUERIES, Access.SHADOW})
    source = "logit lens (nostalgebraist 2020)"
    summary = "applies the model's public output head to what crosses"

    def fit(self, knowledge: Knowledge, effort: Effort, progress: Progress) -> None:
        self._head = knowledge.head
        tokens = knowledge.shadow.train[:TRIALS]
        named = self._named(knowledge.oracle(tokens))
        scores = [(named == tokens).float().mean(), (named[:, :-1] == tokens[:, 1:]).float().mean()]
        self._ahead = torch.stack(scores).argmax()
        progress(1.0, f"reads the {'next' if self._ahead else 'same'} token")

    def recover(self, crossing: Crossing, progress: Progress) -> Recovery:
        tokens = self._named(crossing)
        if self._ahead:
            # The state before names a position's token; before the first there is none.
            tokens = torch.cat([tokens[:, :1], tokens[:, :-1]], 1)
        progress(1.0, "")
        return Recovery(tokens.masked_fill(~crossing.text, -1))

    def state(self) -> dict[str, Tensor]:
        return {"ahead": self._ahead}

    def restore(self, state: Mapping[str, Tensor], knowledge: Knowledge) -> None:
        self._head, self._ahead = knowledge.head, state["ahead"]

    @torch.no_grad()
    def _named(self, crossing: Crossing) -> Tensor:
        """(prompts, positions): the token that the head finds likeliest at each position."""
        chunks = range(0, len(crossing.mask), CHUNK)
        return torch.cat([self._head(crossing.rows(i, i + CHUNK).hidden).argmax(-1) for i in chunks])
