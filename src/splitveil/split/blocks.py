"""Where a model's blocks are, and what stands in for those that the other half has.

A half is the whole model with stand-ins for the missing blocks, so that everything around the blocks (masks, rotary
angles, sliding windows, cache positions) is the model's own code, whatever the family.
"""

import copy
import threading
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from splitveil.errors import BaseModelError


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """(dotted name, list) of the decoder blocks inside ``model``.

    Raises ``BaseModelError`` for a model that has no one list of ``num_hidden_layers`` blocks.
    """
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    shallowest = min((name.count(".") for name, _ in found), default=0)
    found = [(name, module) for name, module in found if name.count(".") == shallowest]
    if len(found) != 1:
        raise BaseModelError(
            f"a {type(model).__name__} cannot be cut: expected one list of {count} blocks in it, found {len(found)}"
        )
    return found[0]


def returns_tuple(model: PreTrainedModel, blocks: nn.ModuleList) -> bool:
    """Whether the model's blocks return a tuple or the bare hidden states; families differ, so one token tells."""
    seen: list[bool] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(isinstance(output, tuple))

    handle = blocks[0].register_forward_hook(look)
    try:
        with torch.no_grad():
            model.base_model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        handle.remove()
    return seen[0]


def with_blocks(model: PreTrainedModel, name: str, blocks: list[nn.Module]) -> PreTrainedModel:
    """``model`` with other blocks; everything else is shared with it, and it stays as it was."""
    twin = cast(PreTrainedModel, _shallow(model))
    holder: nn.Module = twin
    *path, last = name.split(".")
    for part in path:
        holder._modules[part] = _shallow(holder.get_submodule(part))
        holder = holder.get_submodule(part)
    holder._modules[last] = nn.ModuleList(blocks)
    return twin


def _shallow(module: nn.Module) -> Any:
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


class _StandIn(nn.Module):
    """A module in a block's place, with the plain attributes that a model reads from its blocks."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for key, value in vars(block).items():
            if not key.startswith("_") and not isinstance(value, Tensor | nn.Module):
                setattr(self, key, value)


class Absent(_StandIn):
    """Passes on what it gets, and keeps the cache's count of positions right.

    A cache tells a model how many positions went before by the length of its layers, also of those whose block is
    elsewhere: one number a position stands in there for keys and values.
    """

    def __init__(self, block: nn.Module, index: int, as_tuple: bool) -> None:
        super().__init__(block)
        self.index = index
        self.as_tuple = as_tuple

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Cache):
                placeholder = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
                value.update(placeholder, placeholder, self.index)
                break
        return (hidden_states,) if self.as_tuple else hidden_states


class Entrance(_StandIn):
    """Runs a block on the hidden states that arrived, in place of those that it is called with.

    What arrives is kept per thread, so that one half can serve several sessions at once.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self.block = block
        self._slot = threading.local()

    def arrive(self, hidden: Tensor) -> None:
        """Hidden states (batch, position, width) for this thread's next forward."""
        self._slot.hidden = hidden

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        arrived = self._slot.hidden
        del self._slot.hidden
        return self.block(arrived, *args, **kwargs)


class Exit(_StandIn):
    """Runs a block and keeps, per thread, the hidden states that go into it or come out of it."""

    def __init__(self, block: nn.Module, *, output: bool) -> None:
        super().__init__(block)
        self.block = block
        self.output = output
        self._slot = threading.local()

    def leave(self) -> Tensor:
        """Hidden states (batch, position, width) of this thread's last forward, once."""
        hidden: Tensor = self._slot.hidden
        del self._slot.hidden
        return hidden

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = self.block(hidden_states, *args, **kwargs)
        out = result[0] if isinstance(result, tuple) else result
        self._slot.hidden = out if self.output else hidden_states
        return result
