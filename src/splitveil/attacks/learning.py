"""How learned attackers learn: one loop, one schedule, one stopping rule, so that comparisons are fair."""

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from splitveil.attacks.attack import Effort, Progress
from splitveil.errors import NonFiniteError
from splitveil.split import Crossing

RATE = 2e-3
WARMUP = 50
STEADY = 0.7
"""The share of the budget after which the rate falls, at the latest; a plateau brings its fall forward."""
COOLING = 0.3 / STEADY
"""How long the rate falls, relative to the time before."""
FIRST_CHECK = 50
SPACING = 1.25
"""Validations are at step 50 and whenever there were so many times as many steps: dense while much is learnt."""
EARLIEST = 200
PATIENCE = 3
GAIN = 0.05
"""A plateau: after so many steps at least, over so many validations, which is half of all steps, neither has the error
fallen by this share of itself nor has the score risen by it."""


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
    plateau: bool = False
    """Whether learning ended because the score had flattened, before its time was up."""

    @property
    def best(self) -> float:
        return max(point.score for point in self.points)

    @property
    def halfway(self) -> float:
        """The best score in the first half of the steps; NaN where nothing was validated by then."""
        early = [point.score for point in self.points if point.step <= self.points[-1].step / 2]
        return max(early, default=math.nan)

    @property
    def rising(self) -> bool:
        """Whether it ended while it was getting better by more than a plateau does: more time may bring more."""
        return not self.plateau and self.best < 1 and not brought_nothing(self.halfway, self.best)

    def flat(self) -> bool:
        """Whether the last ``PATIENCE`` validations brought nothing."""
        scores = [point.score for point in self.points]
        if len(scores) <= PATIENCE or self.points[-1].step < EARLIEST:
            return False
        return brought_nothing(max(scores[:-PATIENCE]), max(scores[-PATIENCE:]))

    def tensor(self) -> Tensor:
        """(validations, 3): seconds, step, score."""
        return torch.tensor([[p.seconds, p.step, p.score] for p in self.points])

    @classmethod
    def of(cls, tensor: Tensor) -> "Curve":
        """From what ``tensor`` gave."""
        return cls([Point(float(a), int(b), float(c)) for a, b, c in tensor.tolist()])


def brought_nothing(before: float, lately: float) -> bool:
    """Whether a later score is no gain on an earlier one: neither in what is right, nor in what is wrong."""
    return 1 - lately > (1 - GAIN) * (1 - before) and lately < (1 + GAIN) * before


def learn(
    net: nn.Module,
    sample: Callable[[], tuple[Tensor, Crossing]],
    loss: Callable[[Tensor, Crossing], Tensor],
    validate: Callable[[], float],
    effort: Effort,
    progress: Progress,
) -> Curve:
    """Trains ``net`` in place on fresh samples: token ids, and what crosses for them. It ends as it validated best.

    The rate is steady until the validation score has flattened or most of the budget is spent, then falls to zero.
    Raises ``NonFiniteError`` if the loss is NaN or infinite.
    """
    optimiser = torch.optim.AdamW(net.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    began = time.monotonic()
    curve, best = Curve(), copy.deepcopy(net.state_dict())
    cooling_from: float | None = None
    step, next_check, fast = 0, FIRST_CHECK, multiplies_bfloat16()

    def spent() -> float:
        """The share of the budget that is used up: of time or of steps, whichever is further."""
        share = (time.monotonic() - began) / effort.seconds
        return share if effort.steps is None else max(share, step / effort.steps)

    while True:
        now = spent()
        if cooling_from is None and (now >= STEADY or (effort.plateau and curve.flat())):
            cooling_from, curve.plateau = now, now < STEADY
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
        tokens, crossing = sample()
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            value = loss(tokens, crossing)
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


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for it; emulated, it would be slower than float32."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16"))


def cross_entropy(scores: Tensor, tokens: Tensor) -> Tensor:
    """Mean loss of scores (batch, position, vocabulary) for token ids (batch, position)."""
    return functional.cross_entropy(scores.float().flatten(0, 1), tokens.flatten())


def batch_rows(positions: int, vocabulary: int) -> int:
    """Prompts a gradient step: 64, and fewer where the logits of a large vocabulary would fill the memory."""
    return max(4, min(64, 2**26 // (positions * vocabulary)))


CURVE = "curve"


def packed(net: nn.Module, curve: Curve) -> dict[str, Tensor]:
    """What was learnt and how, to be kept on disk."""
    return {**net.state_dict(), CURVE: curve.tensor()}


def unpacked(net: nn.Module, state: Mapping[str, Tensor]) -> Curve:
    """Puts what was kept into ``net``; the curve that came with it."""
    net.load_state_dict({key: value for key, value in state.items() if key != CURVE})
    net.eval()
    return Curve.of(state[CURVE])
