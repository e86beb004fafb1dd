"""What happens above the cut: the cloud's blocks without a head, and the gradient that a training device returns."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from splitveil.errors import ConfigurationError
from splitveil.split import Crossing, Split, cut, cut_in_three

LOGITS = 2**25
"""Entries of the logits that are held at once."""


class UpperBlocks:
    """The blocks after the cut: a crossing → hidden states (batch, position, width) before the final norm."""

    def __init__(self, model: Any, block: int) -> None:
        self._middle = cut_in_three(model, block).middle
        self._width = getattr(self._middle.model.config.get_text_config(decoder=True), "hidden_size", None)

    @torch.no_grad()
    def __call__(self, crossing: Crossing) -> Tensor:
        """Raises ``ConfigurationError`` for a crossing that the blocks cannot read."""
        if self._width is not None and crossing.width != self._width:
            raise ConfigurationError(
                f"the blocks after the cut read states of width {self._width}, this defence sends {crossing.width}: "
                "the cloud cannot run on it, let alone be trained with it"
            )
        states: Tensor = self._middle(crossing)
        return states


class Head:
    """Final norm and output head of a model: hidden states (…, width) → logits (…, vocabulary).

    It is the cloud half of the last cut, which knows every family's way of doing this.
    """

    def __init__(self, model: Any, split: Split) -> None:
        self._cloud = cut(model, split.blocks).cloud
        self._width = model.get_output_embeddings().weight.shape[1]

    def __call__(self, hidden: Tensor) -> Tensor:
        # A defence may send more than the model's width, as the encrypted query does: the head takes what it can.
        hidden = hidden[..., : self._width]
        flat = hidden.reshape(-1, 1, hidden.shape[-1])  # a sequence each: positions have nothing to say to each other
        logits: Tensor = self._cloud(Crossing(flat, torch.ones(len(flat), 1, dtype=torch.long, device=flat.device)))
        return logits.reshape(*hidden.shape[:-1], -1)


def returned_gradient(head: Callable[[Tensor], Tensor], states: Tensor, tokens: Tensor, text: Tensor) -> Tensor:
    """(batch, position, width): the gradient of the loss by ``states``, as a device that learns from its text sends it.

    ``states`` (batch, position, width) came back from the cloud; ``tokens`` and ``text`` (batch, position) are the text
    and where it is. The loss is the summed cross-entropy of each position's next token, divided by how many there are:
    one step of training on all of them. Where no token follows, the gradient is 0.
    """
    follows = torch.zeros_like(text)
    follows[:, :-1] = text[:, :-1] & text[:, 1:]
    labels = tokens.roll(-1, 1)[follows]
    predicted = states[follows]
    gradient = torch.zeros_like(states)
    normaliser, parts = max(1, len(labels)), []
    rows = max(1, LOGITS // _vocabulary(head, states))
    for some, targets in zip(torch.split(predicted, rows), torch.split(labels, rows), strict=True):
        with torch.enable_grad():
            leaf = some.detach().requires_grad_()
            loss = functional.cross_entropy(head(leaf).float(), targets, reduction="sum") / normaliser
            parts.append(torch.autograd.grad(loss, leaf)[0])
    gradient[follows] = torch.cat(parts) if parts else predicted
    return gradient


@torch.no_grad()
def _vocabulary(head: Callable[[Tensor], Tensor], states: Tensor) -> int:
    return int(head(states[:1, :1]).shape[-1])
