"""How learned attackers learn: one loop, one schedule, one stopping rule, so that comparisons are fair."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from splitveil.attacks.attack import Effort, Progress
from splitveil.errors import NonFiniteError

RATE = 2e-3
WARMUP = 50
STEADY = 0.7
"""The share of the budget after which the rate falls, at the latest; a plateau brings its fall forward."""
COOLING = 0.3 / STEADY
"""How long the rate falls, relative to the time before."""
FIRST_CHECK = 25
SPACING = 1.2
"""Validations are at step 25 and whenever there were so many times as many steps: dense while much is learnt."""
PATIENCE = 4
GAIN = 0.001
"""A plateau: the validation score has not risen by this over so many validations, which is half of all steps."""


@dataclass(frozen=True)
class Point:
    """One validation."""

    seconds: float
    step: int
    score: float


@dataclass
class Curve:
    """The validations of a fit, in order."""

    points: list[Point] = field(default_factory=list)

    @property
    def best(self) -> float:
        return max(point.score for point in self.points)

    def flat(self) -> bool:
        """Whether the last ``PATIENCE`` validations brought nothing."""
        scores = [point.score for point in self.points]
        return len(scores) > PATIENCE and max(scores[-PATIENCE:]) < max(scores[:-PATIENCE]) + GAIN

    def tensor(self) -> Tensor:
        """(validations, 3): seconds, step, score."""
        return torch.tensor([[p.seconds, p.step, p.score] for p in self.points])


def learn(
    net: nn.Module,
    loss: Callable[[], Tensor],
    validate: Callable[[], float],
    effort: Effort,
    progress: Progress,
) -> Curve:
    """Trains ``net`` in place on ``loss`` of fresh batches; leaves it with the weights that validated best.

    The rate is steady until the validation score has flattened or most of the budget is spent, then falls to zero.
    Raises ``NonFiniteError`` if the loss is NaN or infinite.
    """
    optimiser = torch.optim.AdamW(net.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    began = time.monotonic()
    curve, best = Curve(), copy.deepcopy(net.state_dict())
    cooling_from: float | None = None
    step, next_check = 0, FIRST_CHECK

    def spent() -> float:
        """The share of the budget that is used up: of time or of steps, whichever is further."""
        share = (time.monotonic() - began) / effort.seconds
        return share if effort.steps is None else max(share, step / effort.steps)

    while True:
        now = spent()
        if cooling_from is None and (now >= STEADY or curve.flat()):
            cooling_from = now
        cooled = 0.0 if cooling_from is None else (now - cooling_from) / max(1e-9, cooling_from * COOLING)
        if step >= next_check or (step and cooled >= 1):
            net.eval()
            score = validate()
            net.train()
            curve.points.append(Point(time.monotonic() - began, step, score))
            if score >= curve.best:
                best = copy.deepcopy(net.state_dict())
            next_check = int(step * SPACING)
            progress(min(1.0, now), f"validation {score:.3f}")
        if cooled >= 1 or (curve.points and curve.points[-1].score == 1.0):
            break
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARMUP) * max(0.0, 1 - cooled)
        value = loss()
        if not math.isfinite(value.item()):
            raise NonFiniteError(f"the loss became {value.item()} after {step} steps; are there NaNs in the crossing?")
        optimiser.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        step += 1
    net.load_state_dict(best)
    net.eval()
    return curve


def batch_rows(positions: int, vocabulary: int) -> int:
    """Prompts a gradient step: 64, and fewer where the logits of a large vocabulary would fill the memory."""
    return max(4, min(64, 2**26 // (positions * vocabulary)))
