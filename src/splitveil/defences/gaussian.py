"""Gaussian noise on the hidden states, in proportion to their size."""

import math
import secrets
from collections.abc import Mapping
from typing import ClassVar

import torch

from splitveil.errors import ConfigurationError, NonFiniteError
from splitveil.split import Crossing


class Gaussian:
    """Adds independent noise with standard deviation σ·‖h‖₂/√width to every entry of a position's state h.

    σ is relative to the root mean square of the position itself, so that one number compares over models and cuts, and
    a position is treated alike whether it crosses alone or among others: an attacker who replays the device half token
    by token meets the noise that the victim had. The sum of squares is what the largest few entries make it. Where a
    model has dominant dimensions (or, at its first position, an attention sink), a small σ buries all the others, and
    σ must not be read as a share of what a typical entry carries.

    The noise is no cryptography: torch's generator is seeded with 63 bits from the operating system at every call.
    """

    name: ClassVar[str] = "gaussian"
    summary: ClassVar[str] = "Gaussian noise, its standard deviation a fixed share of each position's root mean square"

    def __init__(self, sigma: float, seed: int | None = None) -> None:
        """``seed`` makes a sequence of calls repeatable, for an audit; never for a device.

        Raises ``ConfigurationError`` if ``sigma`` is not positive and finite.
        """
        if not (math.isfinite(sigma) and sigma > 0):
            raise ConfigurationError(f"the noise's sigma is a positive number, got {sigma}; for no noise use 'none'")
        self.sigma = sigma
        self._seeds = None if seed is None else torch.Generator().manual_seed(seed)

    @property
    def params(self) -> Mapping[str, float | int | str]:
        """``sigma``, relative to a position's root mean square."""
        return {"sigma": self.sigma}

    def width(self, width: int) -> int:
        """How wide the defended crossing of a plain one of ``width`` is: the same."""
        return width

    def bytes_a_position(self, width: int) -> float:
        """Float32 numbers: 4 · width."""
        return 4.0 * width

    def protect(self, crossing: Crossing) -> Crossing:
        """The same dtype and shape; positions without text stay as they are.

        Raises ``NonFiniteError`` where a state is NaN or infinite: noise in proportion to it would be too.
        """
        states = crossing.hidden[crossing.text].float()
        size = states.square().mean(-1, keepdim=True).sqrt()
        if not bool(size.isfinite().all()):
            raise NonFiniteError("a hidden state is NaN, infinite or too large to be squared; noise cannot be scaled")
        # Drawn on the processor: a seed then means the same noise on every device.
        noise = torch.randn(states.shape, generator=self._generator()).to(states.device)
        hidden = crossing.hidden.clone()
        hidden[crossing.text] = (states + self.sigma * size * noise).to(hidden.dtype)
        return crossing.with_hidden(hidden)

    def _generator(self) -> torch.Generator:
        if self._seeds is not None:
            return self._seeds
        return torch.Generator().manual_seed(secrets.randbits(63))
