"""d_χ-privacy: noise under which close states cannot be told apart, the closer the less."""

import math
import secrets
from collections.abc import Mapping
from typing import ClassVar

import torch

from splitveil.errors import ConfigurationError, NonFiniteError
from splitveil.split import Crossing


class MetricNoise:
    """Adds z with a density proportional to exp(−η‖z‖₂): a uniform direction, and a Gamma(width, 1/η) length.

    Whatever is observed is at most exp(η·‖h − h′‖₂) times likelier under the state h than under h′ (metric
    differential privacy: Chatzikokolakis et al., PETS 2013; for texts: Feyisetan et al., WSDM 2020). η is in units of
    the hidden states, which differ over models and cuts: a scale taken from the state itself would tell its size, and
    the guarantee would be gone. It is one position's guarantee: n positions of a prompt tell n times as much, and
    states that are far apart, as those of two tokens mostly are, are told apart all the same.

    Entries get noise of about √width/η each. It is no cryptography: torch's generator is seeded with 63 bits from the
    operating system at every call.
    """

    name: ClassVar[str] = "dchi"
    summary: ClassVar[str] = "metric differential privacy: noise with a density of exp(−η·length)"

    def __init__(self, eta: float, seed: int | None = None) -> None:
        """``seed`` makes a sequence of calls repeatable, for an audit; never for a device.

        Raises ``ConfigurationError`` if ``eta`` is not positive and finite.
        """
        if not (math.isfinite(eta) and eta > 0):
            raise ConfigurationError(f"eta is a positive number, got {eta}; the smaller, the more noise")
        self.eta = eta
        self._seeds = None if seed is None else torch.Generator().manual_seed(seed)

    @property
    def params(self) -> Mapping[str, float | int | str]:
        """``eta``, per unit of distance between hidden states."""
        return {"eta": self.eta}

    def width(self, width: int) -> int:
        """How wide the defended crossing of a plain one of ``width`` is: the same."""
        return width

    def bytes_a_position(self, width: int) -> float:
        """Float32 numbers: 4 · width."""
        return 4.0 * width

    def protect(self, crossing: Crossing) -> Crossing:
        """The same dtype and shape; positions without text stay as they are.

        Raises ``NonFiniteError`` where a state is NaN or infinite.
        """
        states = crossing.hidden[crossing.text].float()
        if not bool(states.isfinite().all()):
            raise NonFiniteError("a hidden state is NaN or infinite; noise does not hide it")
        generator = self._seeds or torch.Generator().manual_seed(secrets.randbits(63))
        rows, width = states.shape
        # Drawn on the processor: a seed then means the same noise on every device.
        direction = torch.nn.functional.normalize(torch.randn(rows, width, generator=generator), dim=-1)
        # A Gamma variable of whole shape is a sum of exponentials; float64, for the sum of many.
        uniform = torch.rand(rows, width, generator=generator, dtype=torch.float64)
        length = -torch.log1p(-uniform).sum(-1, keepdim=True) / self.eta
        hidden = crossing.hidden.clone()
        noise = (direction * length.float()).to(states.device)
        hidden[crossing.text] = (states + noise).to(hidden.dtype)
        return crossing.with_hidden(hidden)
