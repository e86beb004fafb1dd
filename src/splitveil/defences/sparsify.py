"""Only the largest entries of a state cross."""

from collections.abc import Mapping
from typing import ClassVar

from splitveil.errors import ConfigurationError, NonFiniteError
from splitveil.split import Crossing


class TopK:
    """Keeps the given share of a position's entries, those of the largest absolute values; the others become 0.

    At least one entry is kept. Of equal ones that do not all fit, some are taken. Deterministic.
    """

    name: ClassVar[str] = "topk"
    summary: ClassVar[str] = "only the largest entries of each position, the others zero"

    def __init__(self, share: float, seed: int | None = None) -> None:
        """``seed`` is not used. Raises ``ConfigurationError`` for a ``share`` outside (0, 1]."""
        if not 0 < share <= 1:
            raise ConfigurationError(f"the share of entries that cross is above 0 and at most 1, got {share}")
        self.share = share

    @property
    def params(self) -> Mapping[str, float | int | str]:
        """``share`` of the entries that cross."""
        return {"share": self.share}

    def width(self, width: int) -> int:
        """How wide the defended crossing of a plain one of ``width`` is: the same, zeros included."""
        return width

    def bytes_a_position(self, width: int) -> float:
        """How many cross, their values in float32, and their places; all values and no places where that is less."""
        place = 2 if width <= 2**16 else 4
        return float(min(4 + (4 + place) * self._kept(width), 4 * width))

    def protect(self, crossing: Crossing) -> Crossing:
        """The same dtype and shape; positions without text stay as they are.

        Raises ``NonFiniteError`` where a state is NaN or infinite.
        """
        states = crossing.hidden[crossing.text]
        if not bool(states.isfinite().all()):
            raise NonFiniteError("a hidden state is NaN or infinite; its largest entries have no meaning")
        places = states.abs().topk(self._kept(crossing.width), dim=-1).indices
        hidden = crossing.hidden.clone()
        hidden[crossing.text] = states.new_zeros(states.shape).scatter(-1, places, states.gather(-1, places))
        return crossing.with_hidden(hidden)

    def _kept(self, width: int) -> int:
        return max(1, round(self.share * width))
