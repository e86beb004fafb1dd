"""What every defence is: a crossing in, a crossing out."""

from collections.abc import Mapping
from typing import Protocol

from splitveil.split import Crossing


class Defence(Protocol):
    """One defence with its parameters. It runs on the device, after the device half and before the wire.

    The attacker knows it, its parameters included, and may run it as often as it likes; it does not know the random
    numbers that were drawn for a victim, nor a secret key that the defence draws for itself.
    """

    @property
    def name(self) -> str:
        """What the command line and reports call it."""

    @property
    def summary(self) -> str:
        """One line for people who have never seen it."""

    @property
    def params(self) -> Mapping[str, float | int | str]:
        """Its parameters, part of every row's key."""

    def protect(self, crossing: Crossing) -> Crossing:
        """What crosses instead; fresh randomness at every call where there is any."""

    def bytes_a_position(self, width: int) -> float:
        """What one position of text takes on the wire, for states of ``width`` entries in float32.

        In the smallest exact form of what ``protect`` returns, scales and indices included; the mask and what frames
        a message are not.
        """
