"""What crosses the cut, and nothing else."""

from dataclasses import dataclass

from torch import Tensor

from splitveil.errors import ConfigurationError, NonFiniteError


@dataclass(frozen=True, repr=False)
class Crossing:
    """Hidden states on their way from the device half to the cloud half.

    The cloud learns from it what any observer of the wire learns: the states, their dtype, and which positions hold
    text. Token ids never cross. A device that keeps head and labels to itself (U shape) sends one thing more while it
    trains: the gradient of its loss.
    """

    hidden: Tensor
    """(batch, position, width): what enters the block after the cut, or leaves the last block."""
    mask: Tensor
    """(batch, earlier positions + position) of 0 and 1: 1 where there is text, 0 where there is padding."""
    gradient: Tensor | None = None
    """(batch, position, the model's width): what a U-shaped device sends back for these positions while it trains, the
    gradient of its loss by the hidden states that the cloud returned after the last block. None without training."""

    def __post_init__(self) -> None:
        shapes = f"hidden {tuple(self.hidden.shape)}, mask {tuple(self.mask.shape)}"
        if self.hidden.ndim != 3 or self.mask.ndim != 2:
            raise ConfigurationError(
                f"a crossing is hidden (batch, position, width) and mask (batch, seen), got {shapes}"
            )
        if self.hidden.shape[0] != self.mask.shape[0] or self.hidden.shape[1] > self.mask.shape[1]:
            raise ConfigurationError(f"hidden states and mask of a crossing do not fit together: {shapes}")
        if self.gradient is not None and (
            self.gradient.ndim != 3
            or self.gradient.shape[:2] != self.hidden.shape[:2]
            or not self.gradient.is_floating_point()
        ):
            raise ConfigurationError(
                "a crossing's gradient is floating point (batch, position, width), for the batch and the positions of "
                f"the hidden states; got {self.gradient.dtype} {tuple(self.gradient.shape)} with {shapes}"
            )

    @property
    def text(self) -> Tensor:
        """(batch, position) of bool: which of the positions in ``hidden`` hold text."""
        return self.mask[:, -self.hidden.shape[1] :].bool()

    @property
    def width(self) -> int:
        return self.hidden.shape[2]

    def check_finite(self) -> None:
        """Raises ``NonFiniteError`` where the state of a text position is NaN or infinite."""
        if not bool(self.hidden[self.text].isfinite().all()):
            raise NonFiniteError("a hidden state of a text is NaN or infinite; are there NaNs in the model's weights?")

    def rows(self, start: int, stop: int) -> "Crossing":
        """The prompts ``start`` to ``stop`` of the batch."""
        gradient = None if self.gradient is None else self.gradient[start:stop]
        return Crossing(self.hidden[start:stop], self.mask[start:stop], gradient)

    def with_hidden(self, hidden: Tensor) -> "Crossing":
        """The same positions with other states, as a defence makes them."""
        return Crossing(hidden, self.mask, self.gradient)

    def with_gradient(self, gradient: Tensor) -> "Crossing":
        """The same states, and what the device sends back for them while it trains."""
        return Crossing(self.hidden, self.mask, gradient)
