"""``mlp``: a network that reads each state on its own."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from splitveil.attacks.attack import Effort, Progress, Recovery
from splitveil.attacks.knowledge import Access, Knowledge
from splitveil.attacks.learning import Curve, batch_rows, cross_entropy, learn, packed, unpacked
from splitveil.attacks.samples import Samples, Scale
from splitveil.split import Crossing

HIDDEN = 1024
CHUNK = 1024


class Mlp:
    """A per-position inverter: two hidden layers, then the vocabulary."""

    name = "mlp"
    version = 1
    needs = frozenset({Access.QUERIES, Access.SHADOW})
    source = "per-position inverters (Luo et al., CCS 2025)"
    summary = "a small network from each state to its token"
    curve: Curve
    """Of the validations while learning."""

    def fit(self, knowledge: Knowledge, effort: Effort, progress: Progress) -> None:
        torch.manual_seed(effort.seed)
        samples = Samples(knowledge, effort.seed)
        self._net = _network(knowledge)
        scale = cast(Scale, self._net[0])
        rows = batch_rows(samples.length, knowledge.vocabulary)
        scale.measure(samples.batch(rows)[1].hidden)
        validation, crossing = samples.validation()

        def loss(tokens: Tensor, batch: Crossing) -> Tensor:
            return cross_entropy(self._net(batch.hidden), tokens)

        def validate() -> float:
            return (self._read(crossing.hidden.flatten(0, 1)) == validation.flatten()).float().mean().item()

        self.curve = learn(self._net, lambda: samples.batch(rows), loss, validate, effort, progress)

    def recover(self, crossing: Crossing, progress: Progress) -> Recovery:
        tokens = torch.full(crossing.text.shape, -1)
        tokens[crossing.text] = self._read(crossing.hidden[crossing.text])
        progress(1.0, "")
        return Recovery(tokens)

    def state(self) -> dict[str, Tensor]:
        return packed(self._net, self.curve)

    def restore(self, state: Mapping[str, Tensor], knowledge: Knowledge) -> None:
        self._net = _network(knowledge)
        self.curve = unpacked(self._net, state)

    @torch.no_grad()
    def _read(self, states: Tensor) -> Tensor:
        """The token of each state (states, width)."""
        return torch.cat([self._net(part).argmax(1) for part in torch.split(states, CHUNK)])


def _network(knowledge: Knowledge) -> nn.Sequential:
    return nn.Sequential(
        Scale(knowledge.width),
        nn.Linear(knowledge.width, HIDDEN),
        nn.GELU(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.GELU(),
        nn.Linear(HIDDEN, knowledge.vocabulary),
    )
