"""What an attacker knows. It declares what it needs; it is handed that and nothing else; it never sees the prompt."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from splitveil.errors import UndeclaredKnowledgeError
from splitveil.split import Crossing, DeviceHalf

T = TypeVar("T")


class Access(StrEnum):
    """Kinds of knowledge; the value is how reports name it."""

    QUERIES = "queries to the device half"
    WEIGHTS = "the device half's weights"
    HEAD = "the output head"
    CLOUD = "the cloud half"
    SHADOW = "shadow text"
    EMBEDDINGS = "the public base's input embeddings"
    PRIOR = "the public base as a language model"
    TRUTH = "the prompts themselves"


@dataclass(frozen=True, repr=False)
class Shadow:
    """Text that the attacker has and that is not the victims', as windows of equal length."""

    train: Tensor
    """(windows, positions) token ids."""
    validation: Tensor
    """(windows, positions) token ids of other documents than ``train``, for early stopping."""
    origin: str = "given"
    """Where it is from, in the report's words."""


Protection = Callable[[Crossing], Crossing]
"""What a defence does to a crossing; ``Knowledge`` only needs to call it."""


class Oracle:
    """Runs texts of the attacker's choice through the device half, and counts them.

    What comes back is defended as the victims' crossings are: an attacker adapts.
    """

    def __init__(self, device: DeviceHalf, protect: Protection) -> None:
        self._device = device
        self._protect = protect
        self.sequences = 0
        self.tokens = 0

    @torch.no_grad()
    def __call__(self, tokens: Tensor, mask: Tensor | None = None) -> Crossing:
        """What crosses for ``tokens`` (batch, position). Raises ``NonFiniteError`` where that is no number."""
        self.sequences += tokens.shape[0]
        self.tokens += tokens.numel() if mask is None else int(mask.sum())
        crossing = self._protect(self._device(tokens, mask))
        crossing.check_finite()
        return crossing


class WhiteBox:
    """The device half itself, step by step with a cache, and the defence that stands behind it."""

    def __init__(self, device: DeviceHalf, protect: Protection) -> None:
        self.device = device
        self.protect = protect
        self.evaluations = 0
        """Sequences run through the device half so far, batched or not."""

    def new_cache(self) -> Cache:
        """An empty cache for a prefix."""
        return self.device.new_cache()

    def embeddings(self) -> Tensor:
        """(vocabulary, width) input embeddings."""
        weight: Tensor = self.device.model.get_input_embeddings().weight.detach()
        return weight

    @torch.no_grad()
    def __call__(self, tokens: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Crossing:
        """What crosses for ``tokens`` (batch, position), after what is in ``cache``."""
        return self.protect(self.plain(tokens, mask, cache))

    @torch.no_grad()
    def plain(self, tokens: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Crossing:
        """The same before the defence, which the attacker can leave out where that matches better."""
        self.evaluations += tokens.shape[0]
        crossing: Crossing = self.device(tokens, mask, cache)
        return crossing

    def soft(self, embeds: Tensor, mask: Tensor | None = None) -> Crossing:
        """What crosses, before the defence, for input embeddings (batch, position, width); differentiable."""
        self.evaluations += embeds.shape[0]
        crossing: Crossing = self.device(None, mask, embeds=embeds)
        return crossing


class Prior:
    """A language model of the attacker's: how likely every token is after a text."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def new_cache(self) -> Cache:
        """An empty cache for some texts."""
        return DynamicCache(config=self._model.config)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, cache: Cache) -> Tensor:
        """(texts, vocabulary) log-probabilities of what follows ``tokens`` (texts, positions) after ``cache``."""
        logits: Tensor = self._model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1]
        return logits.float().log_softmax(-1)

    def reorder(self, cache: Cache, rows: Tensor) -> None:
        """Goes on with the texts ``rows`` (texts,) of those in ``cache``, in that order, repetitions included."""
        cache.reorder_cache(rows)


@dataclass(frozen=True)
class Knowledge:
    """Everything that any attack may be handed. Reading what was not granted raises ``UndeclaredKnowledgeError``.

    The vocabulary's size and the width of the crossing are public: the tokenizer is, and the wire shows the width.
    """

    vocabulary: int
    width: int
    granted: frozenset[Access] = frozenset()
    _oracle: Oracle | None = field(default=None, repr=False)
    _white_box: WhiteBox | None = field(default=None, repr=False)
    _head: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    _shadow: Shadow | None = field(default=None, repr=False)
    _embeddings: Tensor | None = field(default=None, repr=False)
    _truth: Tensor | None = field(default=None, repr=False)
    _cloud: Callable[[Crossing], Tensor] | None = field(default=None, repr=False)
    _prior: Prior | None = field(default=None, repr=False)
    gradients: bool = False
    """Whether the crossings under attack hold gradients, as the wire shows."""

    def restricted(self, needs: frozenset[Access]) -> "Knowledge":
        """The same attacker with only what an attack declares; the rest is not there, whatever name it is asked by."""
        missing = needs - self.granted
        if missing:
            raise UndeclaredKnowledgeError(f"this attacker does not have {', '.join(sorted(missing))}")

        def declared(access: Access, value: T) -> T | None:
            return value if access in needs else None

        return Knowledge(
            vocabulary=self.vocabulary,
            width=self.width,
            granted=needs,
            _oracle=declared(Access.QUERIES, self._oracle),
            _white_box=declared(Access.WEIGHTS, self._white_box),
            _head=declared(Access.HEAD, self._head),
            _shadow=declared(Access.SHADOW, self._shadow),
            _embeddings=declared(Access.EMBEDDINGS, self._embeddings),
            _truth=declared(Access.TRUTH, self._truth),
            _cloud=declared(Access.CLOUD, self._cloud),
            _prior=declared(Access.PRIOR, self._prior),
            gradients=self.gradients,
        )

    @property
    def oracle(self) -> Oracle:
        """Queries to the device half, with the defence applied, counted."""
        return self._given(Access.QUERIES, self._oracle)

    @property
    def white_box(self) -> WhiteBox:
        """The device half's weights."""
        return self._given(Access.WEIGHTS, self._white_box)

    @property
    def head(self) -> Callable[[Tensor], Tensor]:
        """The public model's final norm and output head: hidden states (…, width) → logits (…, vocabulary)."""
        return self._given(Access.HEAD, self._head)

    @property
    def cloud(self) -> Callable[[Crossing], Tensor]:
        """The blocks after the cut, which whoever plays the cloud runs: a crossing → hidden states (batch, position,
        the model's width) after the last block, before the final norm."""
        return self._given(Access.CLOUD, self._cloud)

    @property
    def shadow(self) -> Shadow:
        """The attacker's own text."""
        return self._given(Access.SHADOW, self._shadow)

    @property
    def embeddings(self) -> Tensor:
        """(vocabulary, any width) input embeddings of the public base: of its weights, this table and nothing else.

        A device that personalises its own does not change them.
        """
        return self._given(Access.EMBEDDINGS, self._embeddings)

    @property
    def prior(self) -> Prior:
        """The public base, whole, as a language model of the victims' text: no part of a personal device is in it."""
        return self._given(Access.PRIOR, self._prior)

    @property
    def truth(self) -> Tensor:
        """(prompts, positions) the prompts' token ids, -1 for padding: for the control that must reach 1.0."""
        return self._given(Access.TRUTH, self._truth)

    def _given(self, access: Access, value: T | None) -> T:
        if access not in self.granted or value is None:
            raise UndeclaredKnowledgeError(f"an attack asked for {access.value}, which it did not declare or get")
        return value
