"""``ridge``: one linear map from states to word embeddings, in closed form."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from splitveil.attacks.attack import Effort, Progress, Recovery
from splitveil.attacks.knowledge import Access, Knowledge
from splitveil.attacks.samples import Samples, Scale
from splitveil.split import Crossing

ROWS = 6_000
BATCH = 128
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Tried on the validation text, relative to the number of states."""
CHUNK = 1024


class Ridge:
    """Least squares from a state to its token's embedding, then the nearest embedding.

    The penalty is chosen on validation text. (Onto the tokens' indicators instead, frequent words would win.)
    """

    name = "ridge"
    version = 1
    needs = frozenset({Access.QUERIES, Access.SHADOW, Access.EMBEDDINGS})
    source = "ridge regression on activations (per-position inverters, 2025)"
    summary = "a linear map from each state to its word's embedding"

    def fit(self, knowledge: Knowledge, effort: Effort, progress: Progress) -> None:
        samples = Samples(knowledge, effort.seed)
        width, self._embeddings = knowledge.width, unit(knowledge.embeddings)
        self._scale = Scale(width)
        self._scale.measure(samples.batch(BATCH)[1].hidden)
        gram = torch.zeros(width + 1, width + 1, dtype=torch.float64)
        moment = torch.zeros(width + 1, self._embeddings.shape[1], dtype=torch.float64)
        count = 0
        for start in range(0, ROWS, BATCH):
            tokens, crossing = samples.batch(BATCH)
            states = self._features(crossing.hidden.flatten(0, 1))
            gram += (states.T @ states).double()
            moment += (states.T @ self._embeddings[tokens.flatten()]).double()
            count += len(states)
            progress(0.9 * (start + BATCH) / ROWS, "")
        tokens, crossing = samples.validation()
        states = self._features(crossing.hidden.flatten(0, 1))
        best = -1.0
        for penalty in PENALTIES:
            damped = gram + penalty * count * torch.eye(width + 1, dtype=torch.float64)
            weights = torch.linalg.solve(damped, moment).float()
            score = (self._read(states, weights) == tokens.flatten()).float().mean().item()
            if score > best:
                best, self._weights = score, weights
        progress(1.0, f"validation {best:.3f}")

    def recover(self, crossing: Crossing, progress: Progress) -> Recovery:
        tokens = torch.full(crossing.text.shape, -1)
        tokens[crossing.text] = self._read(self._features(crossing.hidden[crossing.text]), self._weights)
        progress(1.0, "")
        return Recovery(tokens)

    def state(self) -> dict[str, Tensor]:
        return {"weights": self._weights, "mean": self._scale.mean, "deviation": self._scale.deviation}

    def restore(self, state: Mapping[str, Tensor], knowledge: Knowledge) -> None:
        self._weights, self._embeddings = state["weights"], unit(knowledge.embeddings)
        self._scale = Scale(knowledge.width)
        self._scale.mean, self._scale.deviation = state["mean"], state["deviation"]

    def _features(self, states: Tensor) -> Tensor:
        """(states, width + 1): scaled, with a constant."""
        scaled = self._scale(states)
        return torch.cat([scaled, scaled.new_ones(len(scaled), 1)], 1)

    def _read(self, features: Tensor, weights: Tensor) -> Tensor:
        """The token of each state; in chunks, as scores of a whole vocabulary take memory."""
        return torch.cat([(part @ weights @ self._embeddings.T).argmax(1) for part in torch.split(features, CHUNK)])


def unit(embeddings: Tensor) -> Tensor:
    """Embeddings around their mean, of length 1."""
    return functional.normalize(embeddings.float() - embeddings.float().mean(0), dim=-1)
