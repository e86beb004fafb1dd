"""A tiny model under attack, for the tests of attacks."""

from collections.abc import Callable
from functools import cached_property

import torch
from equivalence.support import random_model, tiny_llama
from torch import Tensor

from splitveil.attacks.attack import Effort
from splitveil.attacks.knowledge import Access, Knowledge, Oracle, Prior, Protection, Shadow, WhiteBox
from splitveil.auditing.cloud import UpperBlocks, returned_gradient
from splitveil.split import Crossing, cut

VOCABULARY = 160


# One vector holds a few words of texts like the attacker's own: what ``pooled`` is shown, and how long it learns.
SHORT: dict[str, int] = {"length": 4, "words": VOCABULARY}
LONGER = Effort(seconds=120, steps=60)


class Target:
    """A random Llama cut after a block, victims with padding on one side, and all that an attacker may know."""

    def __init__(
        self,
        block: int = 1,
        *,
        blocks: int = 2,
        padding: str = "right",
        protect: Protection | None = None,
        length: int = 16,
        words: int = 80,
    ) -> None:
        """Texts of ``length`` tokens, 384 tokens of victims in all; the attacker's hold the first ``words`` only."""
        shape = tiny_llama(num_hidden_layers=blocks, tie_word_embeddings=True)
        self.model = random_model(shape).requires_grad_(False)
        # As in trained models, the residual stream carries more of a position's own token than of its neighbours.
        self.model.get_input_embeddings().weight.mul_(6)
        self.halves = cut(self.model, block)
        self.protect = protect or (lambda crossing: crossing)
        draw = torch.Generator().manual_seed(5)
        # Words of a small world: by default half of the vocabulary, so that the rest is only met at random.
        self.shadow = Shadow(
            torch.randint(words, (256 * 16 // length, length), generator=draw),
            torch.randint(words, (32 * 16 // length, length), generator=draw),
            "drawn",
        )
        self.victims = torch.randint(VOCABULARY, (24 * 16 // length, length), generator=draw)
        some = length * 5 // 8
        for i in range(0, len(self.victims), 3):
            self.victims[i, slice(some, None) if padding == "right" else slice(0, length - some)] = -1

    @cached_property
    def crossing(self) -> Crossing:
        with torch.no_grad():
            return self.protect(self.halves.device(self.victims.clamp(min=0), (self.victims >= 0).long()))

    @cached_property
    def training(self) -> Crossing:
        """The same crossing while the victims' texts are trained on; for a cloud half that can read it."""
        states = UpperBlocks(self.model, self.halves.block)(self.crossing)
        gradient = returned_gradient(self.head, states, self.victims.clamp(min=0), self.crossing.text)
        return self.crossing.with_gradient(gradient)

    @cached_property
    def head(self) -> Callable[[Tensor], Tensor]:
        """Final norm and output head."""
        last = cut(self.model, self.halves.blocks).cloud

        def head(hidden: Tensor) -> Tensor:
            hidden = hidden[..., : self.model.config.hidden_size]  # of what a defence widened, as much as it can take
            flat = hidden.reshape(-1, 1, hidden.shape[-1])
            logits: Tensor = last(Crossing(flat, torch.ones(flat.shape[:2], dtype=torch.long)))
            return logits.reshape(*hidden.shape[:-1], -1)

        return head

    def noise(self) -> Crossing:
        """A crossing of the same size that holds nothing of the victims."""
        states, draw = self.crossing.hidden, torch.Generator().manual_seed(6)
        return Crossing(torch.randn(states.shape, generator=draw) * states.std(), self.crossing.mask)

    def knowledge(self) -> Knowledge:
        return Knowledge(
            VOCABULARY,
            self.crossing.width,
            frozenset(Access),
            Oracle(self.halves.device, self.protect),
            WhiteBox(self.halves.device, self.protect),
            self.head,
            self.shadow,
            self.model.get_input_embeddings().weight.detach(),
            self.victims,
            UpperBlocks(self.model, self.halves.block),
            Prior(self.model),
            gradients=True,
        )

    def accuracy(self, tokens: Tensor) -> float:
        """Share of the victims' tokens that were recovered."""
        text = self.victims >= 0
        return ((tokens == self.victims) & text).sum().item() / text.sum().item()
