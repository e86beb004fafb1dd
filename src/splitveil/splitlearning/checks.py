"""What a cloud checks of every message before it computes anything."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from splitveil.errors import RefusedError
from splitveil.split import Crossing

NOTHING = -100
"""The label of a position whose next token is not to be predicted."""


@dataclass(frozen=True)
class Limits:
    """What one call may bring."""

    batch: int = 256
    """Texts."""
    states: int = 32768
    """Texts × positions, those before in the cache included: what memory is proportional to."""
    logits: int = 1 << 28
    """Texts × positions × vocabulary where a loss is computed: 1 GiB of float32, of which there are a few copies."""
    pairs: int = 1 << 28
    """Texts × positions × positions that these attend to: as much again for the mask of a long text."""


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Expected:
    """What crossings must look like for one model. All methods raise ``RefusedError``."""

    width: int
    vocabulary: int
    dtype: torch.dtype
    context: int | None
    limits: Limits = DEFAULT_LIMITS

    def crossing(self, crossing: Crossing, earlier: int = 0) -> None:
        """States of positions that follow ``earlier`` ones."""
        batch, count, width = crossing.hidden.shape
        seen = crossing.mask.shape[1]
        if batch < 1 or count < 1:
            raise RefusedError(f"a crossing holds at least one text and one position, got {batch} and {count}")
        if batch > self.limits.batch or batch * seen > self.limits.states:
            raise RefusedError(
                f"{batch} texts of {seen} positions are more than this cloud takes at once: {self.limits.batch} texts, "
                f"{self.limits.states} positions together; use smaller batches"
            )
        if batch * count * seen > self.limits.pairs:
            raise RefusedError(
                f"{batch} texts of {count} positions that attend to {seen} are more than this cloud takes at once: "
                f"{self.limits.pairs} pairs; use smaller batches or shorter texts"
            )
        if seen != earlier + count:
            raise RefusedError(
                f"the mask covers {seen} positions, expected {earlier} earlier ones and {count} new ones"
            )
        if self.context is not None and seen > self.context:
            raise RefusedError(f"{seen} positions are past the model's {self.context}")
        if width != self.width:
            raise RefusedError(f"hidden states are {width} wide, expected {self.width}; do both sides have one model?")
        if crossing.hidden.dtype != self.dtype:
            raise RefusedError(
                f"hidden states are {crossing.hidden.dtype}, expected {self.dtype}: load both sides alike"
            )
        if crossing.mask.is_floating_point() or not bool(((crossing.mask == 0) | (crossing.mask == 1)).all()):
            raise RefusedError("a mask is made of whole numbers 0 and 1")
        if not bool(crossing.mask.any(1).all()):
            raise RefusedError("a text of a batch has padding only")
        if not bool(crossing.hidden.isfinite().all()):
            raise RefusedError("hidden states hold NaN or infinity")

    def labels(self, labels: Tensor, crossing: Crossing) -> None:
        """Tokens to predict, or ``NOTHING``, for the positions of ``crossing``."""
        texts, count, _ = crossing.hidden.shape
        if texts * count * self.vocabulary > self.limits.logits:
            raise RefusedError(
                f"{texts} texts of {count} positions have more logits than this cloud computes at once, "
                f"{self.limits.logits} numbers for a vocabulary of {self.vocabulary}; use smaller batches"
            )
        if tuple(labels.shape) != (texts, count):
            raise RefusedError(f"labels are {tuple(labels.shape)}, expected {(texts, count)}: one for each position")
        if labels.dtype != torch.int64:
            raise RefusedError(f"labels are {labels.dtype}, expected torch.int64")
        told = labels != NOTHING
        if not bool(((labels >= 0) & (labels < self.vocabulary))[told].all()):
            raise RefusedError(f"a label is outside the vocabulary of {self.vocabulary} tokens and is not {NOTHING}")
        if not bool(told.any()):
            raise RefusedError("no position has a label")
        if bool(told[~crossing.text].any()):
            raise RefusedError("a position without text has a label")

    def gradient(self, gradient: Tensor, output: Tensor) -> None:
        """What comes back for ``output`` (batch, position, width)."""
        if tuple(gradient.shape) != tuple(output.shape) or gradient.dtype != output.dtype:
            raise RefusedError(
                f"the gradient is {tuple(gradient.shape)} of {gradient.dtype}, expected {tuple(output.shape)} of "
                f"{output.dtype}, as the hidden states were"
            )
        if not bool(gradient.isfinite().all()):
            raise RefusedError("the gradient holds NaN or infinity; this micro-batch is dropped")


def check_normaliser(normaliser: float) -> None:
    """Raises ``RefusedError`` unless it is a positive number."""
    if not (math.isfinite(normaliser) and normaliser > 0):
        raise RefusedError(f"the normaliser is a positive number of tokens, got {normaliser}")
