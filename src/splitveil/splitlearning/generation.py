"""Text through a split model: one crossing a token; what is chosen of the logits is chosen on the device."""

import math
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from splitveil.errors import ConfigurationError, NonFiniteError
from splitveil.splitlearning.device import Device
from splitveil.splitlearning.interface import Cloud


@dataclass(frozen=True)
class Sampling:
    """Drawing tokens instead of taking the likeliest. Raises ``ConfigurationError`` for numbers out of range."""

    temperature: float = 1.0
    top_k: int = 0
    """Only the likeliest so many tokens; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability; 1: all."""
    seed: int | None = None
    """None: from the operating system."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0) or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ConfigurationError(
                "sampling takes a temperature above 0, a top_k from 0 and a top_p above 0 and at most 1, got "
                f"{self.temperature}, {self.top_k}, {self.top_p}; for the likeliest tokens use no sampling"
            )
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigurationError(f"a seed is a whole number from 0 and below 2^63, got {self.seed}")


@torch.no_grad()
def generate(
    device: Device,
    cloud: Cloud,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    end: Collection[int] = (),
    pad: int = 0,
    each: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """``tokens`` (batch, position; padding on the left) and their continuation, as ``generate`` of a whole model.

    A text that has come to a token of ``end`` goes on with ``pad``; when all have, it is over. ``each`` gets the tokens
    (batch,) of every step. The cloud's cache is emptied first.

    Raises ``ConfigurationError`` for prompts that are empty, padded on the right or too long for the model with what is
    to follow; what the cloud raises; ``ProtocolError`` and ``NonFiniteError`` for what it answers.
    """
    mask = torch.ones_like(tokens) if mask is None else mask.long()
    _check(device, tokens, mask, max_new_tokens)
    choose = _chooser(sampling)
    cloud.restart()
    cache, step, sequence = device.new_cache(), tokens, tokens
    going = torch.ones(len(tokens), dtype=torch.bool)
    ends = torch.tensor(sorted(end), dtype=torch.long)
    for _ in range(max_new_tokens):
        logits = device.next_logits(cloud, step, mask, cache).float().cpu()
        chosen = torch.where(going, choose(sequence, logits), pad)
        going &= ~torch.isin(chosen, ends)
        if each is not None:
            each(chosen)
        step = chosen[:, None]
        sequence = torch.cat([sequence, step], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        if not bool(going.any()):
            break
    return sequence


def _likeliest(_: Tensor, logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def _chooser(sampling: Sampling | None) -> Callable[[Tensor, Tensor], Tensor]:
    if sampling is None:
        return _likeliest
    warpers = LogitsProcessorList()
    if sampling.temperature != 1:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
    generator = torch.Generator().manual_seed(seed)

    def draw(sequence: Tensor, logits: Tensor) -> Tensor:
        probabilities = warpers(sequence, logits).softmax(-1)
        if not bool(probabilities.isfinite().all()):
            # Divided by the temperature something has overflowed, which it does not where the largest is 0.
            probabilities = warpers(sequence, logits - logits.amax(-1, keepdim=True)).softmax(-1)
        if not bool(probabilities.isfinite().all()):
            raise NonFiniteError(f"no token can be drawn at temperature {sampling.temperature:g}; raise it")
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]

    return draw


def _check(device: Device, tokens: Tensor, mask: Tensor, new: int) -> None:
    if tokens.ndim != 2 or 0 in tokens.shape or tokens.dtype != torch.int64:
        raise ConfigurationError(
            f"prompts are (batch, position) int64 ids, got {tuple(tokens.shape)} of {tokens.dtype}"
        )
    if mask.shape != tokens.shape or not bool(((mask == 0) | (mask == 1)).all()):
        raise ConfigurationError(
            f"the mask is {tuple(tokens.shape)} of 0 and 1 as the prompts are, got {tuple(mask.shape)}"
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= device.vocabulary:
        raise ConfigurationError(f"a prompt holds tokens outside the vocabulary of {device.vocabulary}")
    if not bool((mask[:, -1] == 1).all()) or bool((mask.diff(dim=1) < 0).any()):
        raise ConfigurationError("prompts are padded on the left, and end in text")
    if new < 1:
        raise ConfigurationError(f"at least one new token is asked for, got {new}")
    # The last token that is chosen never goes into the model.
    if device.context is not None and tokens.shape[1] + new - 1 > device.context:
        raise ConfigurationError(
            f"prompts of {tokens.shape[1]} tokens and {new} new ones are past the model's context of {device.context}"
        )
