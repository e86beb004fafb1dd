"""One cut under one defence: the victims' crossing, and what an attacker may know about the device that made it."""

from typing import Any

import torch
from torch import Tensor

from splitveil.attacks.knowledge import Access, Knowledge, Oracle, Prior, Shadow, WhiteBox
from splitveil.auditing.cloud import Head, UpperBlocks, returned_gradient
from splitveil.auditing.windows import Victims
from splitveil.defences.defence import Defence
from splitveil.split import Crossing, Split, cut

BATCH = 32


class Stage:
    """The victims' prompts are sent first, once; whatever an attacker asks of the same device comes after them."""

    def __init__(
        self,
        model: Any,
        block: int,
        defence: Defence,
        victims: Victims,
        shadow: Shadow,
        *,
        attackers: Any = None,
        public: Any = None,
        training: bool = False,
    ) -> None:
        """``model`` is the victims'. The attackers' device half and head are those of ``attackers``, the embeddings
        those of ``public``; by default both are ``model`` too. With ``training``, gradients cross as well, undefended.

        Raises ``ConfigurationError`` for training where the upper blocks cannot read what the defence sends, and
        ``NonFiniteError`` where what crosses is no number: no attack is to blame for what it makes of that.
        """
        self.split = cut(model, block)
        self.defence = defence
        self._upper = UpperBlocks(model, block)
        self._known = self.split if attackers is None else cut(attackers, block)
        self._attackers = model if attackers is None else attackers
        self._public = model if public is None else public
        self._victims = victims
        self._shadow = shadow
        self._training = training
        self.crossing = cross(self.split, defence, victims)
        if training:
            self.crossing = self.crossing.with_gradient(self._gradient(Head(model, self.split)))

    def knowledge(self) -> Knowledge:
        """Everything that any attack may declare, with counters at zero."""
        embeddings = public_embeddings(self._public)
        device, protect = self._known.device, self.defence.protect
        return Knowledge(
            vocabulary=embeddings.shape[0],
            width=self.crossing.width,
            granted=frozenset(Access),
            _oracle=Oracle(device, protect),
            _white_box=WhiteBox(device, protect),
            _head=Head(self._attackers, self._known),
            _shadow=self._shadow,
            _embeddings=embeddings,
            _truth=self._victims.tokens,
            _cloud=self._upper,
            _prior=Prior(self._public),
            gradients=self._training,
        )

    def _gradient(self, head: Head) -> Tensor:
        where = self.crossing.hidden.device
        returned = [self._upper(self.crossing.rows(start, start + BATCH)) for start in self._starts()]
        tokens = self._victims.tokens.clamp(min=0).to(where)
        return returned_gradient(head, torch.cat(returned), tokens, self.crossing.text)

    def _starts(self) -> range:
        return range(0, len(self.crossing.mask), BATCH)


def public_embeddings(model: Any) -> Tensor:
    """(vocabulary, width) input embeddings of the audited model: the public language model that everyone has."""
    weight: Tensor = model.get_input_embeddings().weight.detach()
    return weight


@torch.no_grad()
def cross(split: Split, defence: Defence, victims: Victims) -> Crossing:
    """What the victims' device sends, in batches as a device would. Raises ``NonFiniteError`` for NaN and infinity."""
    where = split.device.model.device
    ids, mask = victims.tokens.clamp(min=0).to(where), victims.mask.to(where)
    parts = [
        defence.protect(split.device(ids[start : start + BATCH], mask[start : start + BATCH]))
        for start in range(0, len(ids), BATCH)
    ]
    crossing = Crossing(torch.cat([part.hidden for part in parts]), torch.cat([part.mask for part in parts]))
    crossing.check_finite()
    return crossing
