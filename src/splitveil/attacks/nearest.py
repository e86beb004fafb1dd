"""``nearest``: the recorded state that is most like the one that crossed."""

from collections.abc import Mapping

import torch
from torch import Tensor

from splitveil.attacks.attack import Effort, Progress, Recovery
from splitveil.attacks.knowledge import Access, Knowledge
from splitveil.attacks.samples import Scale
from splitveil.split import Crossing

RECORDS = 65_536
"""About so many states are recorded, at least one for each vocabulary entry."""
MOST_PER_TOKEN = 16
LENGTH = 48
CHUNK = 1024


class Nearest:
    """Records what crosses for every vocabulary entry in random company, and looks up the nearest record.

    The simplest of the published attacks, and under noise still one of the strongest: it needs no shadow text.
    """

    name = "nearest"
    version = 1
    needs = frozenset({Access.QUERIES})
    source = "nearest neighbour among recorded activations (e.g. Luo et al., CCS 2025)"
    summary = "compares what crosses with recordings of every word in the vocabulary"

    def fit(self, knowledge: Knowledge, effort: Effort, progress: Progress) -> None:
        draw = torch.Generator().manual_seed(effort.seed)
        each = max(1, min(MOST_PER_TOKEN, RECORDS // knowledge.vocabulary))
        order = torch.cat([torch.randperm(knowledge.vocabulary, generator=draw) for _ in range(each)])
        # The first position of a text is often unlike all others; every entry is recorded elsewhere.
        lead = torch.randint(knowledge.vocabulary, (-(-len(order) // LENGTH), 1), generator=draw)
        body = torch.cat([order, order[: -len(order) % LENGTH]]).view(-1, LENGTH)
        states = []
        for start in range(0, len(body), 64):
            rows = torch.cat([lead[start : start + 64], body[start : start + 64]], 1)
            states.append(knowledge.oracle(rows).hidden[:, 1:].float().flatten(0, 1))
            progress(min(1.0, (start + 64) / len(body)), "")
        self._scale = Scale(knowledge.width)
        self._scale.measure(torch.cat(states))
        self._records = self._scale(torch.cat(states))
        self._tokens = body.flatten()

    @torch.no_grad()
    def recover(self, crossing: Crossing, progress: Progress) -> Recovery:
        tokens = torch.full(crossing.text.shape, -1)
        states = self._scale(crossing.hidden[crossing.text])
        found = []
        squares = self._records.square().sum(1)
        for start in range(0, len(states), CHUNK):
            # argmin |s − r|² over r
            found.append((squares - 2 * states[start : start + CHUNK] @ self._records.T).argmin(1))
            progress(min(1.0, (start + CHUNK) / len(states)), "")
        tokens[crossing.text] = self._tokens[torch.cat(found)]
        return Recovery(tokens)

    def state(self) -> dict[str, Tensor]:
        return {
            "records": self._records,
            "tokens": self._tokens,
            "mean": self._scale.mean,
            "deviation": self._scale.deviation,
        }

    def restore(self, state: Mapping[str, Tensor], knowledge: Knowledge) -> None:
        self._records, self._tokens = state["records"], state["tokens"]
        self._scale = Scale(knowledge.width)
        self._scale.mean, self._scale.deviation = state["mean"], state["deviation"]
