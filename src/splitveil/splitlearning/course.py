"""How long and how fast a run learns."""

import math
from dataclasses import dataclass
from enum import StrEnum

from splitveil.errors import ConfigurationError


class Decay(StrEnum):
    """What the learning rate does after its warm-up."""

    CONSTANT = "constant"
    COSINE = "cosine"
    """Half a cosine, from the full rate to 0 just after the last step."""


@dataclass(frozen=True)
class Course:
    """The device's settings of a run. Raises ``ConfigurationError`` for what makes no sense."""

    steps: int
    rate: float = 1e-3
    """The highest learning rate."""
    batch: int = 8
    """Windows in a micro-batch."""
    accumulation: int = 1
    """Micro-batches in a step; they change nothing but the memory that is needed."""
    warmup: int = 0
    """Steps over which the rate rises linearly from 0; the first of them is at rate / warmup."""
    decay: Decay = Decay.CONSTANT
    evaluate_every: int = 0
    """Steps between looks at what is held out, besides before the first and after the last; 0: only those."""
    save_every: int = 100
    """Steps between checkpoints; there is one after the last step, too."""
    seed: int = 0
    """Of the order of the windows."""

    def __post_init__(self) -> None:
        counts = (self.steps, self.batch, self.accumulation, self.save_every)
        others = (self.warmup, self.evaluate_every)
        if min(counts) < 1 or min(others) < 0:
            raise ConfigurationError(
                "steps, batch, accumulation and save_every are at least 1, warmup and evaluate_every at least 0, got "
                f"{', '.join(map(str, (*counts, *others)))}"
            )
        if not (math.isfinite(self.rate) and 0 < self.rate <= 1):
            raise ConfigurationError(f"the learning rate is above 0 and at most 1, got {self.rate}")
        if not 0 <= self.seed < 2**63:
            raise ConfigurationError(f"the seed is a whole number from 0 to 2^63 - 1, got {self.seed}")

    def rate_of(self, step: int) -> float:
        """The learning rate of step ``step``, from 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        if self.decay is Decay.CONSTANT:
            return self.rate
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.rate * (1 + math.cos(math.pi * min(done, 1.0))) / 2

    def __str__(self) -> str:
        """What a resumed run has to have in common with the one it goes on with; the number of steps is free to grow
        where the rate does not depend on it."""
        shown = [self.rate, self.batch, self.accumulation, self.warmup, self.decay, self.seed]
        return repr(shown + ([self.steps] if self.decay is Decay.COSINE else []))
