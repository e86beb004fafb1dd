"""What a device asks of the cloud that holds the upper blocks: one interface, in this process or over a network."""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from torch import Tensor

from splitveil.errors import ConfigurationError
from splitveil.split import Crossing


class Shape(StrEnum):
    """Where the last norm and the head are."""

    STRAIGHT = "straight"
    """In the cloud: it returns logits, and learns from labels that the device sends. LABELS ARE THE TEXT."""
    U = "u"
    """On the device: the cloud returns hidden states, and gets their gradient back. Labels stay on the device."""


class Trains(StrEnum):
    """What an optimiser may change on one side."""

    NOTHING = "nothing"
    LORA = "lora"
    FULL = "full"


@dataclass(frozen=True)
class Optimiser:
    """AdamW, the same on both sides; the learning rate comes with every step.

    Raises ``ConfigurationError`` for a number that is not finite or out of range.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        ranges = ((self.beta1, 1.0), (self.beta2, 1.0), (self.epsilon, 1.0), (self.weight_decay, 10.0))
        if not all(math.isfinite(value) and 0 <= value < top for value, top in ranges):
            raise ConfigurationError(f"an optimiser's numbers are out of range: {self}")


@dataclass(frozen=True)
class Plan:
    """What both sides must agree on before a run of training; part of its checkpoints.

    Raises ``ConfigurationError`` for what makes no sense.
    """

    cut: int
    shape: Shape
    device: Trains
    cloud: Trains
    optimiser: Optimiser = Optimiser()
    rank: int = 8
    """Of the adapters, on either side; their scale is alpha / rank."""
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Modules that carry an adapter, by the last part of their names."""
    seed: int = 0
    """Of the adapters' first weights. Both sides draw them for all blocks: a split run begins as an unsplit one."""
    freeze_embeddings: bool = False
    """Full training leaves the matrix of input embeddings as it is, and with it a head that is tied to it."""

    def __post_init__(self) -> None:
        if self.cut < 0 or not 1 <= self.rank <= 1024 or not 0 <= self.seed < 2**63:
            raise ConfigurationError(
                "a plan needs a cut from 0, a rank from 1 to 1024 and a seed from 0, "
                f"got {self.cut}, {self.rank}, {self.seed}"
            )
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigurationError(f"alpha is a positive number, got {self.alpha}")
        if self.device is Trains.NOTHING and self.cloud is Trains.NOTHING:
            raise ConfigurationError("nothing is trained on either side")


class Cloud(Protocol):
    """One session. Every call may raise ``RefusedError``, ``ProtocolError`` and ``ConnectionFailedError``.

    What the cloud finds wrong with a message (shapes, numbers that are not finite) it refuses; weights stay as they
    were before that micro-batch, and the session goes on.
    """

    def extend(self, crossing: Crossing) -> Tensor:
        """Generation: the next positions of the texts in this session's cache; ``crossing.mask`` covers those too.

        Straight: logits (batch, vocabulary) of the last position. U: its hidden state (batch, width).
        """

    def restart(self) -> None:
        """Empties the session's cache: other texts follow."""

    def evaluate(self, crossing: Crossing, labels: Tensor | None) -> tuple[Tensor | None, float]:
        """Without learning: (None, summed loss) for labels (straight); (hidden states, NaN) without (U)."""

    def forward(self, crossing: Crossing, labels: Tensor | None, normaliser: float) -> tuple[Tensor, float]:
        """One micro-batch of training.

        Straight: ``labels`` (batch, position) are the tokens to predict at each position, -100 where there is none; the
        loss is their summed cross-entropy over ``normaliser``, and what comes back is its gradient by the crossing's
        states, and the loss; the cloud's own gradients are accumulated. U: no labels; what comes back are the hidden
        states after the last block (batch, position, width), and NaN; ``backward`` must follow.
        """

    def backward(self, gradient: Tensor) -> Tensor:
        """U: gradient of the loss by what ``forward`` returned; back comes the gradient by the crossing's states."""

    def step(self, rate: float) -> None:
        """One step of the cloud's optimiser, at this learning rate, on what was accumulated; then that is zero."""

    def discard(self) -> None:
        """Forgets what was accumulated since the last step."""

    def save(self, step: int) -> None:
        """Keeps the cloud's part of the run as it is after ``step`` steps; it is on the disk when this returns."""

    def close(self) -> None:
        """Ends the session; safe to call twice."""
