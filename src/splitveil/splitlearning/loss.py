"""The one loss of all training here."""

import torch
from torch import Tensor

from splitveil.splitlearning.checks import NOTHING


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of ``labels`` (batch, position) under ``logits`` (batch, position, vocabulary), summed, in nats.

    A scalar in float32 whatever the model computes in; positions whose label is ``NOTHING`` do not count.
    """
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=NOTHING, reduction="sum"
    )


def next_tokens(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Labels (batch, position) for ``tokens`` (batch, position): the token that follows, where there is text at both.

    The last position has none.
    """
    labels = torch.full_like(tokens, NOTHING)
    labels[:, :-1] = tokens[:, 1:]
    if mask is not None:
        both = mask[:, :-1].bool() & mask[:, 1:].bool()
        labels[:, :-1][~both] = NOTHING
    return labels
