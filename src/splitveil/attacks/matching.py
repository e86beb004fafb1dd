"""Which next token a gradient belongs to: the direction of each token's own gradient, compared with what crossed.

At a position with state z the gradient of the cross-entropy is s · J(z)ᵀ(p − e_y): J is the Jacobian of final norm and
head, p what they predict from z, y the token that follows, and s > 0 is one over the number of predicted tokens, which
the cloud is not told. So only directions are compared. Both z, which the cloud computed itself, and J, where the head
is public, are known: y is what is left.

The gradient of every entry of a vocabulary, at every position, would be too much. Jacobian-vector products give the
inner product of what crossed with all entries' gradients at once; their lengths are estimated from random directions.
The likeliest few of each position are then computed exactly.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Head = Callable[[Tensor], Tensor]
"""Hidden states (…, width) → logits (…, vocabulary); differentiable."""

SHORTLIST = 16
PREDICTED = 4
"""The model's own likeliest tokens, which are candidates everywhere: where the model is sure of the truth, its gradient
is so small that estimated lengths say little."""
ENTRIES = 2**24
"""Logits that are held at once."""
LEAST = 0.1
"""Of the squared lengths of its two parts, the least that a difference is taken to have: so wrong is the estimate."""


class Matcher:
    """Compares gradients with those of all tokens, for one head."""

    def __init__(self, head: Head, vocabulary: int, lengths: Tensor | None = None) -> None:
        self._head = head
        self._vocabulary = vocabulary
        self.lengths = torch.ones(vocabulary) if lengths is None else lengths
        """(vocabulary,) squared length of each entry's gradient by the state, relative to the mean of all entries."""

    def measure(self, states: Tensor, draw: torch.Generator) -> None:
        """Estimates ``lengths`` from some states (n, width), each in a random direction."""
        total = torch.zeros(self._vocabulary)
        for some in torch.split(states, self._rows(1)):
            squares = self._along(some, torch.randn(some.shape, generator=draw))[1].square()
            total += (squares / squares.mean(1, keepdim=True)).sum(0)
        self.lengths = total / len(states)

    def candidates(self, states: Tensor, gradients: Tensor) -> Tensor:
        """(n, SHORTLIST + PREDICTED) token ids whose gradients at ``states`` (n, width) may be ``gradients``."""
        draw = torch.Generator().manual_seed(0)
        found = [
            self._shortlist(some, unit(those), draw)
            for some, those in zip(*(torch.split(x, self._rows(1)) for x in (states, gradients)), strict=True)
        ]
        return torch.cat(found) if found else torch.zeros(0, 0, dtype=torch.long)

    def distances(self, states: Tensor, gradients: Tensor, candidates: Tensor) -> Tensor:
        """(n, candidates): how far the exact gradient's direction is from what crossed, from 0 to 2 (opposite)."""
        count, found = candidates.shape[1], []
        for some, those, tokens in zip(
            *(torch.split(x, self._rows(count)) for x in (states, gradients, candidates)), strict=True
        ):
            own = gradient_of(self._head, some.repeat_interleave(count, 0), tokens.flatten())
            found.append((unit(own).view(len(some), count, -1) - unit(those)[:, None]).norm(dim=-1))
        return torch.cat(found) if found else torch.zeros(candidates.shape)

    def _shortlist(self, states: Tensor, gradients: Tensor, draw: torch.Generator) -> Tensor:
        logits, along = self._along(states, gradients)
        chances = logits.softmax(-1)
        mean = _vector_product(self._head, states, chances)
        towards_mean = self._along(states, mean)[1]
        probe = self._along(states, torch.randn(states.shape, generator=draw))[1].square()
        squares = self.lengths * (probe.mean(1, keepdim=True) / self.lengths.mean())
        parts = mean.square().sum(1, keepdim=True) + squares
        length = torch.maximum(parts - 2 * towards_mean, LEAST * parts).sqrt()
        likeness = ((chances * along).sum(1, keepdim=True) - along) / length
        few = min(SHORTLIST, self._vocabulary), min(PREDICTED, self._vocabulary)
        return torch.cat([likeness.topk(few[0]).indices, chances.topk(few[1]).indices], 1)

    def _along(self, states: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, vocabulary) at ``states`` (n, width), and how they change along ``directions`` (n, width)."""
        with torch.no_grad():
            found = torch.func.jvp(self._head, (states,), (directions,))
        return found[0], found[1]

    def _rows(self, candidates: int) -> int:
        return max(1, ENTRIES // (self._vocabulary * candidates))


def gradient_of(head: Head, states: Tensor, tokens: Tensor) -> Tensor:
    """(n, width): the gradient of the cross-entropy of ``tokens`` (n,) by each of ``states`` (n, width)."""
    with torch.enable_grad():
        leaf = states.detach().requires_grad_()
        loss = functional.cross_entropy(head(leaf).float(), tokens, reduction="sum")
        return torch.autograd.grad(loss, leaf)[0]


def unit(vectors: Tensor) -> Tensor:
    """Of length 1, however small; zero where they are zero."""
    largest = vectors.abs().amax(-1, keepdim=True)
    return functional.normalize(vectors / torch.where(largest > 0, largest, 1.0), dim=-1)


def _vector_product(head: Head, states: Tensor, weights: Tensor) -> Tensor:
    """(n, width): Jᵀ · weights, for weights (n, vocabulary)."""
    with torch.enable_grad():
        leaf = states.detach().requires_grad_()
        return torch.autograd.grad((head(leaf).float() * weights).sum(), leaf)[0]
