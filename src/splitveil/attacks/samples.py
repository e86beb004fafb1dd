"""What learned attackers learn from: texts of their own, and what crosses for them."""

import torch
from torch import Tensor, nn

from splitveil.attacks.knowledge import Knowledge
from splitveil.split import Crossing

UNTOUCHED = 0.2
HEAVIEST = 0.6
"""A fifth of the texts are asked for as they are; in the others up to this share of the tokens is random. With more, an
attacker of the same time reads shallow cuts better and deep ones worse."""
VALIDATION = 64
"""The most validation windows."""


class Samples:
    """Shadow windows, many of them with random tokens in random places, and their crossings.

    An attacker who may query anything is not bound to the words of its shadow text: random tokens let it see the whole
    vocabulary, whatever domain the shadow text is from.
    """

    def __init__(self, knowledge: Knowledge, seed: int, *, untouched: float = UNTOUCHED) -> None:
        """``untouched`` is the share of the windows that are asked for as they are."""
        self._draw = torch.Generator().manual_seed(seed)
        self._oracle = knowledge.oracle
        self._windows = knowledge.shadow.train
        self._validation = knowledge.shadow.validation[:VALIDATION]
        self._vocabulary = knowledge.vocabulary
        self._untouched = untouched

    @property
    def length(self) -> int:
        """Positions of a window."""
        return self._windows.shape[1]

    def batch(self, size: int) -> tuple[Tensor, Crossing]:
        """(size, positions) token ids and what crosses for them."""
        chosen = torch.randint(len(self._windows), (size,), generator=self._draw)
        tokens = self._replaced(self._windows[chosen])
        return tokens, self._oracle(tokens)

    def validation(self) -> tuple[Tensor, Crossing]:
        """Validation windows as they are, and once more with random tokens in them, and their crossings."""
        tokens = torch.cat([self._validation, self._replaced(self._validation)])
        return tokens, self._oracle(tokens)

    def random(self, size: int) -> tuple[Tensor, Crossing]:
        """The same shapes, of random tokens only."""
        tokens = torch.randint(self._vocabulary, (size, self.length), generator=self._draw)
        return tokens, self._oracle(tokens)

    def _replaced(self, tokens: Tensor) -> Tensor:
        share = torch.rand(len(tokens), 1, generator=self._draw) * HEAVIEST
        touched = torch.rand(len(tokens), 1, generator=self._draw) >= self._untouched
        where = (torch.rand(tokens.shape, generator=self._draw) < share) & touched
        return torch.where(where, torch.randint(self._vocabulary, tokens.shape, generator=self._draw), tokens)


class Scale(nn.Module):
    """Brings each dimension of the states to mean 0 and deviation 1: a few dimensions would drown all others."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    @torch.no_grad()
    def measure(self, hidden: Tensor) -> None:
        """Takes both from states (…, width)."""
        flat = hidden.float().flatten(0, -2)
        self.mean.copy_(flat.mean(0))
        # A dimension that never varies, or hardly in this precision, is left as small as it is.
        self.deviation.copy_(flat.std(0).clamp(min=1e-6))

    def forward(self, hidden: Tensor) -> Tensor:
        return (hidden.float() - self.mean) / self.deviation
