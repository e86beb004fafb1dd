"""The upper blocks in this process: one session of a cloud, without the network."""

import logging
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from splitveil.errors import ConfigurationError, DataError, NonFiniteError, RefusedError
from splitveil.serving.operations.logs import tell
from splitveil.split import Crossing
from splitveil.splitlearning.checkpoint import Checkpoints, Facts
from splitveil.splitlearning.checks import DEFAULT_LIMITS, Expected, Limits, check_normaliser
from splitveil.splitlearning.halves import Side, context_of, fingerprint, prepare, vocabulary_of, width_of
from splitveil.splitlearning.interface import Optimiser, Plan, Shape
from splitveil.splitlearning.loss import summed_loss
from splitveil.splitlearning.trainable import Trainable

log = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")
SHOWN = "this run in the cloud"


class LocalCloud:
    """``interface.Cloud`` over a copy of a base model, which is only read: what this session trains is its own.

    One call at a time. Whatever it refuses, weights and what was accumulated are as before that micro-batch.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        *,
        cut: int,
        shape: Shape,
        plan: Plan | None = None,
        folder: Path | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        """``plan``: None where nothing is trained. ``folder``: of this run's checkpoints, made when it is needed.

        Raises ``ConfigurationError`` and ``BaseModelError`` for what this model cannot do.
        """
        if plan is not None and plan.shape is not shape:
            raise ConfigurationError(f"the plan is of the {plan.shape} shape and the session of the {shape} shape")
        parts = prepare(base, cut, plan, Side.CLOUD)
        self._middle = parts.three.middle
        self._tail = parts.three.tail if shape is Shape.STRAIGHT else None
        self._plan = plan
        self._own = Trainable(parts.trained, Optimiser() if plan is None else plan.optimiser)
        self._place, self._base = base.device, fingerprint(base)
        self._checkpoints = None if folder is None else Checkpoints(folder, SHOWN)
        self._expected = Expected(width_of(base), vocabulary_of(base), base.dtype, context_of(base), limits)
        self._cache, self._texts = self._middle.new_cache(), 0
        self._waiting: tuple[Tensor, Tensor] | None = None
        self._saved, self._before = 0, 0
        """Steps of the checkpoint that this session went on from or wrote last, and of the one before it."""

    def __repr__(self) -> str:
        return f"LocalCloud({self._own!r})"

    # -- generation and evaluation -------------------------------------------------------------------------------------

    @torch.no_grad()
    def extend(self, crossing: Crossing) -> Tensor:
        """See ``Cloud``. ``RefusedError`` also for another number of texts than the cache holds."""
        earlier = self._cache.get_seq_length()
        self._expected.crossing(crossing, earlier)
        texts = crossing.hidden.shape[0]
        if earlier and texts != self._texts:
            raise RefusedError(f"{texts} texts go on where {self._texts} began; restart for others")
        self._texts = texts
        last = self._middle(self._here(crossing), self._cache)[:, -1:]
        result: Tensor = last if self._tail is None else self._tail(Crossing(last, self._here(crossing).mask[:, -1:]))
        if not bool(result.isfinite().all()):
            self.restart()
            raise RefusedError("the model's own numbers became NaN or infinite; the texts have to begin anew")
        return result[:, -1].to(crossing.hidden.device)

    def restart(self) -> None:
        """See ``Cloud``."""
        self._cache = self._middle.new_cache()

    @torch.no_grad()
    def evaluate(self, crossing: Crossing, labels: Tensor | None) -> tuple[Tensor | None, float]:
        """See ``Cloud``."""
        here, labels = self._checked(crossing, labels)
        hidden = self._middle(here)
        if self._tail is None or labels is None:
            _finite(hidden, "a hidden state")
            return hidden.to(crossing.hidden.device), math.nan
        loss = summed_loss(self._tail(here.with_hidden(hidden)), labels)
        _finite(loss, "the loss")
        return None, loss.item()

    # -- training ------------------------------------------------------------------------------------------------------

    def forward(self, crossing: Crossing, labels: Tensor | None, normaliser: float) -> tuple[Tensor, float]:
        """See ``Cloud``. ``RefusedError`` also while the gradient for the last one is outstanding (U)."""
        self._training()
        check_normaliser(normaliser)
        if self._waiting is not None:
            raise RefusedError("the gradient for the last micro-batch has not come; send it, or discard")
        here, labels = self._checked(crossing, labels)
        states = here.hidden.detach().requires_grad_()
        with torch.enable_grad():
            hidden = self._middle(here.with_hidden(states))
            if self._tail is None or labels is None:
                _finite(hidden, "a hidden state")
                self._waiting = (states, hidden)
                return hidden.detach().to(crossing.hidden.device), math.nan
            loss = summed_loss(self._tail(here.with_hidden(hidden)), labels) / normaliser
            _finite(loss, "the loss")
            return self._learn(loss, None, states).to(crossing.hidden.device), loss.item()

    def backward(self, gradient: Tensor) -> Tensor:
        """See ``Cloud``. Whatever comes of it, the micro-batch is over: after a refusal it begins with ``forward``."""
        self._training()
        if self._waiting is None:
            raise RefusedError("a gradient came without a micro-batch that it belongs to; forward comes first")
        (states, hidden), self._waiting = self._waiting, None
        self._expected.gradient(gradient, hidden)
        return self._learn(hidden, gradient.to(hidden.device), states).to(gradient.device)

    def step(self, rate: float) -> None:
        """See ``Cloud``. ``RefusedError`` with nothing accumulated, a gradient outstanding, or a rate beyond [0, 1]."""
        self._training()
        if self._waiting is not None:
            raise RefusedError("the gradient for the last micro-batch has not come; send it, or discard")
        self._own.step(rate)

    def discard(self) -> None:
        """See ``Cloud``; also what waits for its gradient."""
        self._waiting = None
        self._own.discard()

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def save(self, step: int) -> None:
        """See ``Cloud``. ``RefusedError`` in the midst of a step, or for another number of steps than were made."""
        plan, checkpoints = self._training(), self._stored()
        if self._waiting is not None or self._own.batches:
            raise RefusedError("a checkpoint is made between steps; step or discard first")
        if step != self._own.steps:
            raise RefusedError(f"{self._own.steps} steps were made here, and {step} on the device: nothing was saved")
        before = self._before if step == self._saved else self._saved
        try:
            checkpoints.write(Facts(step, Side.CLOUD, plan, self._base), self._own.state(), before)
        except DataError as error:
            # Whoever runs the cloud is told, too: the disk is theirs.
            tell(log, logging.ERROR, "checkpoint_not_written", run=checkpoints.folder.name, error=str(error))
            raise RefusedError(str(error)) from None
        self._saved, self._before = step, before

    def steps(self) -> tuple[int, ...]:
        """Steps of this run whose checkpoints are whole, in order."""
        return () if self._checkpoints is None else self._checkpoints.steps()

    def resume(self, steps: Collection[int]) -> int:
        """Goes on from the newest of ``steps``, those that the device has, and returns it; 0 where it has none.

        ``RefusedError`` where it has some and no whole checkpoint of them is here, or one of another plan or model:
        a run never begins from scratch without having been asked to.
        """
        plan = self._training()
        if not steps:
            return 0
        checkpoints = self._stored()
        here = checkpoints.steps()
        common = set(here) & set(steps)
        if not common:
            damaged = "".join(f"; {text}" for text in checkpoints.damaged.values())
            raise RefusedError(
                f"the device can go on from steps {_listed(steps)} and the cloud from {_listed(here)}: none in common"
                f"{damaged}. Begin a new run in another folder"
            )
        self._restore(checkpoints, max(common), plan)
        return max(common)

    def _restore(self, checkpoints: Checkpoints, step: int, plan: Plan) -> None:
        try:
            kept = checkpoints.read(step)
            if kept.facts.plan != plan:
                raise RefusedError(f"step {step} of this run was trained by another plan: {kept.facts.plan}")
            if kept.facts.base != self._base:
                raise RefusedError(f"step {step} of this run was trained on another base model than is served now")
            self._own.restore(kept.tensors, step)
        except ConfigurationError as error:
            raise RefusedError(str(error)) from None
        self._waiting, self._saved = None, step
        self.restart()

    def close(self) -> None:
        """See ``Cloud``: lets go of what the session holds."""
        self.discard()
        self.restart()

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _learn(self, output: Tensor, gradient: Tensor | None, states: Tensor) -> Tensor:
        """Accumulates this side's gradients, and returns that by ``states``."""
        first, *own = torch.autograd.grad(output, [states, *self._own.list], gradient, allow_unused=True)
        if first is None:
            raise RefusedError("the loss does not depend on the states that crossed")
        _finite(first, "the gradient by the states")
        _guarded(self._own.accumulate, own)
        return first

    def _checked(self, crossing: Crossing, labels: Tensor | None) -> tuple[Crossing, Tensor | None]:
        self._expected.crossing(crossing)
        if self._tail is None and labels is not None:
            raise RefusedError("labels are the text, and stay on the device in the U shape; send none")
        if self._tail is not None and labels is None:
            raise RefusedError("the head is in the cloud in the straight shape: it needs labels")
        if labels is not None:
            self._expected.labels(labels, crossing)
        return self._here(crossing), None if labels is None else labels.to(self._place)

    def _here(self, crossing: Crossing) -> Crossing:
        return Crossing(crossing.hidden.detach().to(self._place), crossing.mask.to(self._place))

    def _training(self) -> Plan:
        if self._plan is None:
            raise RefusedError("this session was opened without a plan: it does not train")
        return self._plan

    def _stored(self) -> Checkpoints:
        if self._checkpoints is None:
            raise RefusedError("this cloud keeps no checkpoints: it was started without a folder for them")
        return self._checkpoints


def trained_cloud(
    base: PreTrainedModel,
    folder: Path,
    *,
    cut: int,
    shape: Shape,
    steps: Collection[int] = (),
    limits: Limits = DEFAULT_LIMITS,
) -> LocalCloud:
    """A cloud for use, with weights that a run left in ``folder``: the newest whole ones, of ``steps`` if any are
    given.

    Raises ``RefusedError`` where there are none, or where they are of another cut, shape or base model.
    """
    checkpoints = Checkpoints(folder, SHOWN)
    here = checkpoints.steps()
    wanted = [step for step in here if step in steps] if steps else list(here)
    if not wanted:
        damaged = "".join(f"; {text}" for text in checkpoints.damaged.values())
        of = f" of step {_listed(steps)}, which the device has, but of {_listed(here)}" if steps and here else ""
        raise RefusedError(f"there are no trained weights of this run here{of}{damaged}")
    plan = checkpoints.read(wanted[-1]).facts.plan
    if (plan.cut, plan.shape) != (cut, shape):
        raise RefusedError(f"this run was trained at cut {plan.cut} in the {plan.shape} shape, not at {cut}, {shape}")
    cloud = LocalCloud(base, cut=cut, shape=shape, plan=plan, folder=folder, limits=limits)
    cloud.resume(wanted[-1:])
    return cloud


def _finite(tensor: Tensor, what: str) -> None:
    if not bool(tensor.isfinite().all()):
        raise RefusedError(f"{what} became NaN or infinite; this micro-batch is dropped, and nothing was changed by it")


def _guarded(call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    try:
        return call(*args, **kwargs)
    except NonFiniteError as error:
        raise RefusedError(f"{error}; this micro-batch is dropped, and nothing was changed by it") from None


def _listed(steps: Collection[int]) -> str:
    return ", ".join(map(str, sorted(steps))) or "none"
