"""The device's side: embeddings and lower blocks, in the U shape the head too, and whatever is personal in them."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from splitveil.defences.defence import Defence
from splitveil.defences.encrypted import EncryptedQuery
from splitveil.defences.none import Plain
from splitveil.defences.permute import Permutation
from splitveil.defences.quantise import BFloat16, Int4, Int8
from splitveil.defences.regularise import Regulariser
from splitveil.defences.regularised import Regularised
from splitveil.errors import ConfigurationError, NonFiniteError, ProtocolError
from splitveil.split import Crossing
from splitveil.split.personal import write_adapters, write_weights
from splitveil.splitlearning.checks import NOTHING
from splitveil.splitlearning.halves import Side, context_of, fingerprint, prepare, vocabulary_of, width_of
from splitveil.splitlearning.interface import Cloud, Optimiser, Plan, Shape, Trains
from splitveil.splitlearning.loss import summed_loss
from splitveil.splitlearning.trainable import Trainable

STRAIGHT_THROUGH = (Int8, Int4, BFloat16)
"""Defences that round: their gradient is taken as the identity's, for their own is zero wherever it exists."""


class Device:
    """What one person's device holds of a copy of a base model, which is only read."""

    def __init__(
        self,
        base: PreTrainedModel,
        *,
        cut: int,
        shape: Shape,
        plan: Plan | None = None,
        defence: Defence | None = None,
        regulariser: Regulariser | None = None,
    ) -> None:
        """``plan``: None where nothing is trained. ``base`` may be ``split.personal.personalised``, to use it.

        Raises ``ConfigurationError`` and ``BaseModelError`` for what this model cannot do, and for defences that are
        not done to what crosses: the encrypted layer, on which upper blocks cannot compute, and a regularised half.
        """
        if isinstance(defence, EncryptedQuery):
            raise ConfigurationError(
                "encrypted states cannot be read by upper blocks in the cloud. For a private adapter in place of a "
                "split model use `splitveil serve` and `splitveil generate`; here choose another defence"
            )
        if isinstance(defence, Regularised):
            raise ConfigurationError(
                "a regularised device half is its weights, and does nothing to what crosses: train one with "
                "--regularise, and use it with --personal"
            )
        if plan is not None and plan.shape is not shape:
            raise ConfigurationError(f"the plan is of the {plan.shape} shape and the device of the {shape} shape")
        parts = prepare(base, cut, plan, Side.DEVICE)
        self.plan, self.shape, self.cut = plan, shape, cut
        self.base = fingerprint(base)
        self.context = context_of(base)
        self.vocabulary = vocabulary_of(base)
        self.own = Trainable(parts.trained, Optimiser() if plan is None else plan.optimiser)
        self._half = parts.three.device
        self._tail = parts.three.tail if shape is Shape.U else None
        self._defence: Defence = Plain() if defence is None else defence
        self._regulariser = regulariser
        self._width, self._place = width_of(base), base.device

    def __repr__(self) -> str:
        return f"Device(cut={self.cut}, shape={self.shape}, {self.own!r})"

    @property
    def defences(self) -> str:
        """What crosses, and with which penalty it is learnt: names and parameters, and of a key its digest."""
        penalty = "" if self._regulariser is None else f" {self._regulariser.name} {self._regulariser.weight}"
        key = f" {self._defence.key_digest}" if isinstance(self._defence, Permutation) else ""
        return f"{self._defence.name} {dict(self._defence.params)}{key}{penalty}"

    # -- use -----------------------------------------------------------------------------------------------------------

    def new_cache(self) -> Cache:
        """An empty cache for texts that begin."""
        return self._half.new_cache()

    @torch.no_grad()
    def crossing(self, tokens: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Crossing:
        """What crosses for ``tokens`` (batch, position), the defence applied; ``mask`` covers the cache's too."""
        return self._defence.protect(self._half(*self._here(tokens, mask), cache))

    @torch.no_grad()
    def next_logits(self, cloud: Cloud, tokens: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        """Logits (batch, vocabulary) of what follows ``tokens`` (batch, position), the next ones of the cache's texts.

        Raises what the cloud raises, ``ProtocolError`` for an answer of another shape, ``NonFiniteError`` for NaN.
        """
        crossing = self.crossing(tokens, mask, cache)
        got = cloud.extend(crossing)
        width = self.vocabulary if self._tail is None else self._width
        got = self._check(got, (tokens.shape[0], width), "next states or logits", crossing)
        if self._tail is None:
            return got
        logits: Tensor = self._tail(Crossing(got[:, None], crossing.mask[:, -1:]))[:, -1]
        return logits

    @torch.no_grad()
    def evaluate(self, cloud: Cloud, tokens: Tensor, labels: Tensor, mask: Tensor | None = None) -> float:
        """Summed cross-entropy of ``labels`` (batch, position) in nats, without learning."""
        crossing = self.crossing(tokens, mask)
        hidden, loss = cloud.evaluate(crossing, None if self._tail else labels)
        if self._tail is not None:
            hidden = self._check(hidden, tuple(crossing.hidden.shape), "hidden states", crossing)
            loss = summed_loss(self._tail(crossing.with_hidden(hidden)), labels.to(self._place)).item()
        return _finite(loss)

    # -- training ------------------------------------------------------------------------------------------------------

    def learn(
        self, cloud: Cloud, tokens: Tensor, labels: Tensor, normaliser: float, mask: Tensor | None = None
    ) -> float:
        """One micro-batch, forwards and back: gradients are accumulated on both sides. The loss, in nats a token.

        The loss is the summed cross-entropy of ``labels`` (batch, position) over ``normaliser``, without a
        regulariser's part. That part counts by the micro-batch's share of the predicted tokens.

        Raises ``NonFiniteError`` for a loss or gradient that is NaN or infinite, and what the cloud raises. Nothing was
        accumulated here then; the cloud may have (``discard`` on both sides ends the step).
        """
        tokens, mask = self._here(tokens, mask)
        with torch.enable_grad():
            crossing = self._half(tokens, mask)
            penalty = self._penalty(crossing, tokens, labels, normaliser)
            if isinstance(self._defence, STRAIGHT_THROUGH):
                leaving, sent = crossing.hidden, self._defence.protect(_cut_off(crossing))
            else:
                sent = self._defence.protect(crossing)
                leaving, sent = sent.hidden, _cut_off(sent)
            if self._tail is None:
                gradient, loss = cloud.forward(sent, labels, normaliser)
                above: list[Tensor | None] = [None] * len(self.own.list)
                _finite(loss)
            else:
                gradient, loss, above = self._through_tail(cloud, sent, labels, normaliser)
            gradient = self._check(gradient, tuple(leaving.shape), "gradient", sent)
            below = self._below(leaving, gradient, penalty)
        both = [b if a is None else a if b is None else a + b for a, b in zip(above, below, strict=True)]
        self.own.accumulate(both)
        return loss

    def step(self, rate: float) -> None:
        """One step of this side's optimiser at this learning rate. Raises as ``Trainable.step``."""
        self.own.step(rate)

    def discard(self) -> None:
        """Forgets what this side accumulated since its last step."""
        self.own.discard()

    def save_personal(self, folder: Path, step: int = 0) -> Path | None:
        """Writes what was trained on this side for ``split.personal.personalised``; None where nothing is trained.

        ``step`` is kept with it: the cloud's part that belongs to it is that of the same step.
        """
        if self.plan is None or not self.own.parameters:
            return None
        tensors = {name: parameter.detach().cpu() for name, parameter in self.own.parameters.items()}
        if self.plan.device is Trains.LORA:
            write_adapters(folder, tensors, rank=self.plan.rank, alpha=self.plan.alpha, step=step)
        else:
            write_weights(folder, tensors, step=step)
        return folder

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _through_tail(
        self, cloud: Cloud, sent: Crossing, labels: Tensor, normaliser: float
    ) -> tuple[Tensor, float, list[Tensor | None]]:
        """(gradient by what was sent, loss, gradients of this side's parameters in the tail)."""
        if self._tail is None:
            raise ConfigurationError("there is no tail on the device in the straight shape")
        hidden, _ = cloud.forward(sent, None, normaliser)
        arrived = self._check(hidden, tuple(sent.hidden.shape), "hidden states", sent).detach().requires_grad_()
        loss = summed_loss(self._tail(sent.with_hidden(arrived)), labels.to(self._place)) / normaliser
        _finite(loss.item())
        first, *above = torch.autograd.grad(loss, [arrived, *self.own.list], allow_unused=True)
        if first is None or not bool(first.isfinite().all()):
            raise NonFiniteError("the gradient of the loss by the hidden states is NaN or infinite")
        return cloud.backward(first), float(loss.item()), list(above)

    def _below(self, leaving: Tensor, gradient: Tensor, penalty: Tensor | None) -> list[Tensor | None]:
        parameters = self.own.list
        outputs = [(leaving, gradient), (penalty, None)]
        needed = [(o, g) for o, g in outputs if o is not None and o.requires_grad]
        if not parameters or not needed:
            return [None] * len(parameters)
        found = torch.autograd.grad([o for o, _ in needed], parameters, [g for _, g in needed], allow_unused=True)
        return list(found)

    def _penalty(self, crossing: Crossing, tokens: Tensor, labels: Tensor, normaliser: float) -> Tensor | None:
        if self._regulariser is None:
            return None
        share = int((labels != NOTHING).sum()) / normaliser
        embeddings = self._half.model.get_input_embeddings()(tokens).detach()
        penalty = self._regulariser.penalty(embeddings, crossing.hidden, crossing.text)
        _finite(penalty.item())
        return self._regulariser.weight * share * penalty

    def _check(self, got: Tensor | None, shape: tuple[int, ...], what: str, sent: Crossing) -> Tensor:
        if got is None or tuple(got.shape) != shape or got.dtype != sent.hidden.dtype:
            found = "nothing" if got is None else f"{tuple(got.shape)} of {got.dtype}"
            raise ProtocolError(
                f"the cloud answered with {found}, expected {what} {shape} of {sent.hidden.dtype}; are both versions "
                "the same?"
            )
        if not bool(got.isfinite().all()):
            raise NonFiniteError(f"the cloud answered with {what} that hold NaN or infinity")
        return got.to(self._place)

    def _here(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return tokens.to(self._place), None if mask is None else mask.to(self._place)


def _cut_off(crossing: Crossing) -> Crossing:
    return Crossing(crossing.hidden.detach(), crossing.mask)


def _finite(loss: float) -> float:
    if not -float("inf") < loss < float("inf"):
        raise NonFiniteError(f"the loss became {loss}; lower the learning rate and resume from the last checkpoint")
    return loss
