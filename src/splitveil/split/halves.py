"""``cut``: a causal language model as a device half and a cloud half whose composition is the whole."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from splitveil.errors import ConfigurationError
from splitveil.split.blocks import Absent, Entrance, Exit, find_blocks, returns_tuple, with_blocks
from splitveil.split.crossing import Crossing


class DeviceHalf(nn.Module):
    """Embeddings and the blocks before the cut: token ids in, a ``Crossing`` out."""

    def __init__(self, model: PreTrainedModel, exit_: Exit) -> None:
        super().__init__()
        self.model = model
        self._exit = [exit_]  # in a list: it is registered inside the model already

    def new_cache(self) -> Cache:
        """An empty cache for one session of this half."""
        return DynamicCache(config=self.model.config)

    def forward(
        self,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        *,
        embeds: Tensor | None = None,
    ) -> Crossing:
        """What crosses for ``tokens`` (batch, position), or for input embeddings ``embeds`` (batch, position, width).

        ``mask`` (batch, earlier positions + position) covers what is in ``cache`` too; without it all is text.
        Raises ``ConfigurationError`` unless exactly one of ``tokens`` and ``embeds`` is given.
        """
        given = [x for x in (tokens, embeds) if x is not None]
        if len(given) != 1:
            raise ConfigurationError(f"a device half takes either tokens or embeds, got {len(given)} of them")
        batch, count = given[0].shape[:2]
        seen = (0 if cache is None else cache.get_seq_length()) + count
        mask = _mask(mask, batch, seen, given[0].device)
        self.model.base_model(
            input_ids=tokens,
            inputs_embeds=embeds,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
            **_positions(self.model, mask, count),
        )
        return Crossing(self._exit[0].leave(), mask)


class _Upper(nn.Module):
    """What begins where a ``Crossing`` arrives."""

    def __init__(self, model: PreTrainedModel, entrance: Entrance) -> None:
        super().__init__()
        self.model = model
        self._entrance = [entrance]

    def new_cache(self) -> Cache:
        """An empty cache for one session of this half."""
        return DynamicCache(config=self.model.config)

    def _run(self, module: nn.Module, crossing: Crossing, cache: Cache | None) -> Any:
        hidden, mask = crossing.hidden, crossing.mask
        seen = (0 if cache is None else cache.get_seq_length()) + hidden.shape[1]
        mask = _mask(mask, hidden.shape[0], seen, hidden.device)
        width = self.model.get_input_embeddings().embedding_dim
        self._entrance[0].arrive(hidden)
        # Only the shape of these is read: masks and positions come from it, the states from what arrived.
        blank = torch.zeros(*hidden.shape[:2], width, dtype=hidden.dtype, device=hidden.device)
        return module(
            inputs_embeds=blank,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
            **_positions(self.model.base_model, mask, hidden.shape[1]),
        )


class CloudHalf(_Upper):
    """The blocks after the cut, the final norm and the head: a ``Crossing`` in, logits out."""

    def forward(self, crossing: Crossing, cache: Cache | None = None) -> Tensor:
        """Logits (batch, position, vocabulary) of the positions that crossed."""
        logits: Tensor = self._run(self.model, crossing, cache).logits
        return logits


class MiddlePart(_Upper):
    """The blocks after the cut and nothing above them: a ``Crossing`` in, hidden states out."""

    def __init__(self, model: PreTrainedModel, entrance: Entrance, exit_: Exit) -> None:
        super().__init__(model, entrance)
        self._exit = [exit_]

    def forward(self, crossing: Crossing, cache: Cache | None = None) -> Tensor:
        """(batch, position, width): what the last block makes of it, before the final norm."""
        self._run(self.model.base_model, crossing, cache)
        return self._exit[0].leave()


@dataclass(frozen=True)
class Split:
    """Both halves of a model that was cut after block ``block`` of ``blocks``; 0 is after the embeddings."""

    device: DeviceHalf
    cloud: CloudHalf
    block: int
    blocks: int

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (batch, position, vocabulary) of ``tokens`` (batch, position), through the cut."""
        return self.cloud(self.device(tokens, mask))  # type: ignore[no-any-return]

    @torch.no_grad()
    def generate(self, tokens: Tensor, mask: Tensor | None = None, *, max_new_tokens: int) -> Tensor:
        """``tokens`` (batch, position; padding on the left) and their greedy continuation, one crossing a token.

        Generation goes on for ``max_new_tokens`` whatever it says; stopping at an end token is the caller's.
        """
        device_cache, cloud_cache = self.device.new_cache(), self.cloud.new_cache()
        mask = torch.ones_like(tokens) if mask is None else mask
        step, sequence = tokens, tokens
        for _ in range(max_new_tokens):
            logits = self.cloud(self.device(step, mask, device_cache), cloud_cache)
            step = logits[:, -1].argmax(-1, keepdim=True)
            sequence = torch.cat([sequence, step], 1)
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], 1)
        return sequence


def cut(model: Any, block: int) -> Split:
    """Cuts a Hugging Face causal language model after ``block`` blocks; 0 cuts after the embeddings.

    The model itself is not changed, and the halves share its weights. A PEFT model is cut with its adapter in place.
    The last cut crosses before the final norm.

    Raises ``ConfigurationError`` for a cut that the model does not have, ``BaseModelError`` for a model whose blocks
    cannot be found.
    """
    whole: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    name, blocks = find_blocks(whole)
    count = len(blocks)
    if not 0 <= block <= count:
        raise ConfigurationError(f"cut {block} does not exist: this model has {count} blocks, so cuts 0 to {count}")
    as_tuple = returns_tuple(whole, blocks)
    absent: list[nn.Module] = [Absent(module, index, as_tuple) for index, module in enumerate(blocks)]

    lower: list[nn.Module] = [*blocks[:block], *absent[block:]]
    exit_ = Exit(lower[min(block, count - 1)], output=block == count)
    lower[min(block, count - 1)] = exit_
    upper: list[nn.Module] = [*absent[:block], *blocks[block:]]
    entrance = Entrance(upper[min(block, count - 1)])
    upper[min(block, count - 1)] = entrance
    return Split(
        DeviceHalf(with_blocks(whole, name, lower), exit_),
        CloudHalf(with_blocks(whole, name, upper), entrance),
        block,
        count,
    )


@dataclass(frozen=True)
class Three:
    """A U-shaped cut after block ``block`` of ``blocks``: lower blocks, upper blocks, and what follows the last one."""

    device: DeviceHalf
    middle: MiddlePart
    tail: CloudHalf
    """Final norm and head: what leaves the last block in, logits out."""
    block: int
    blocks: int

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (batch, position, vocabulary) of ``tokens`` (batch, position), through both cuts."""
        crossing = self.device(tokens, mask)
        return self.tail(crossing.with_hidden(self.middle(crossing)))  # type: ignore[no-any-return]


def cut_in_three(model: Any, block: int) -> Three:
    """Cuts after ``block`` blocks and again after the last one, so that one side can hold both ends of the model.

    As ``cut`` otherwise, with the same errors.
    """
    whole: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    name, blocks = find_blocks(whole)
    lower = cut(whole, block).device
    count, last = len(blocks), len(blocks) - 1
    as_tuple = returns_tuple(whole, blocks)
    absent = (Absent(module, index, as_tuple) for index, module in enumerate(blocks[:block]))
    middle: list[nn.Module] = [*absent, *blocks[block:]]
    entrance = Entrance(middle[min(block, last)])
    middle[min(block, last)] = entrance
    exit_ = Exit(middle[last], output=True)
    middle[last] = exit_
    part = MiddlePart(with_blocks(whole, name, middle), entrance, exit_)
    return Three(lower, part, cut(whole, count).cloud, block, count)


def _mask(mask: Tensor | None, batch: int, seen: int, device: torch.device) -> Tensor:
    if mask is None:
        return torch.ones(batch, seen, dtype=torch.long, device=device)
    if mask.shape != (batch, seen):
        raise ConfigurationError(
            f"the mask covers {tuple(mask.shape)}, expected {(batch, seen)}: earlier positions and the new ones"
        )
    return mask.long()


def _positions(model: nn.Module, mask: Tensor, count: int) -> dict[str, Tensor]:
    """Position ids from the mask, so that padding on the left does not count; for families that take them."""
    base = model.base_model if isinstance(model, PreTrainedModel) else model
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return {}
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -count:]}
