"""One cut under one defence: the victims' crossing, and what an attacker may know about the device that made it."""

from typing import Any

import torch
from torch import Tensor

from splitveil.attacks.knowledge import Access, Knowledge, Oracle, Shadow, WhiteBox
from splitveil.auditing.windows import Victims
from splitveil.defences.defence import Defence
from splitveil.split import Crossing, Split, cut

BATCH = 32


class Stage:
    """The victims' prompts are sent first, once; whatever an attacker asks of the same device comes after them."""

    def __init__(self, model: Any, block: int, defence: Defence, victims: Victims, shadow: Shadow) -> None:
        self.split = cut(model, block)
        self.defence = defence
        self.crossing = cross(self.split, defence, victims)
        self._model = model
        self._victims = victims
        self._shadow = shadow

    def knowledge(self) -> Knowledge:
        """Everything that any attack may declare, with counters at zero."""
        embeddings = public_embeddings(self._model)
        device, protect = self.split.device, self.defence.protect
        return Knowledge(
            vocabulary=embeddings.shape[0],
            width=self.crossing.width,
            granted=frozenset(Access),
            _oracle=Oracle(device, protect),
            _white_box=WhiteBox(device, protect),
            _head=Head(self._model, self.split),
            _shadow=self._shadow,
            _embeddings=embeddings,
            _truth=self._victims.tokens,
        )


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


def public_embeddings(model: Any) -> Tensor:
    """(vocabulary, width) input embeddings of the audited model: the public language model that everyone has."""
    weight: Tensor = model.get_input_embeddings().weight.detach()
    return weight


@torch.no_grad()
def cross(split: Split, defence: Defence, victims: Victims) -> Crossing:
    """What the victims' device sends, in batches as a device would."""
    where = split.device.model.device
    ids, mask = victims.tokens.clamp(min=0).to(where), victims.mask.to(where)
    parts = [
        defence.protect(split.device(ids[start : start + BATCH], mask[start : start + BATCH]))
        for start in range(0, len(ids), BATCH)
    ]
    return Crossing(torch.cat([part.hidden for part in parts]), torch.cat([part.mask for part in parts]))
