"""No defence: the hidden states cross as they are."""

from collections.abc import Mapping
from typing import ClassVar

from splitveil.split import Crossing


class Plain:
    """What every other defence is compared with."""

    name: ClassVar[str] = "none"
    summary: ClassVar[str] = "no defence: the hidden states cross as they are"

    @property
    def params(self) -> Mapping[str, float | int | str]:
        """None."""
        return {}

    def width(self, width: int) -> int:
        """How wide the defended crossing of a plain one of ``width`` is: the same."""
        return width

    def bytes_a_position(self, width: int) -> float:
        """Float32 numbers: 4 · width."""
        return 4.0 * width

    def protect(self, crossing: Crossing) -> Crossing:
        """``crossing`` itself."""
        return crossing
