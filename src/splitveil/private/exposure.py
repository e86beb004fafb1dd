"""What a ledger has to keep of a private layer so that its leakage can be computed later, without the weights.

The vendor's to keep, not to publish: κ_c is a figure of the weights, though hardly a telling one.
"""

import json
import math
from dataclasses import asdict, dataclass

from splitveil.errors import DataError
from splitveil.lattice.parameters import ParameterSet, parameter_set
from splitveil.private.core import core_rms
from splitveil.private.engine import ServedHalf
from splitveil.private.lattice_served import LatticeServed
from splitveil.private.leakage import LEARNED, Channel, Leakage, leakage, peak_ratio, rows_until
from splitveil.private.published import Publication


@dataclass(frozen=True)
class Facts:
    """Of one layer, besides its width and the noise."""

    parameters: str
    """The parameter set's name."""
    rank: int
    norm_bound: int
    """ρ, published."""
    peak_ratio: float
    """κ_c of the core that is served."""

    def __str__(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def read(cls, text: str) -> "Facts":
        """What ``str`` wrote. Raises ``DataError`` for anything else."""
        try:
            found = cls(**json.loads(text))
            kinds = [type(value) for value in asdict(found).values()]
        except (ValueError, TypeError):
            kinds = []
        if kinds != [str, int, int, float] or not (
            found.rank > 0 and found.norm_bound > 0 and math.isfinite(found.peak_ratio) and found.peak_ratio > 0
        ):
            raise DataError(f"the ledger's facts of a layer cannot be read: {text[:200]!r}")
        return found


def facts_of(half: ServedHalf, publication: Publication) -> list[Facts | None]:
    """One a layer, in the publication's order; None for engines against which no attack was measured."""
    if not isinstance(half, LatticeServed):
        return [None] * len(publication.layers)
    found: list[Facts | None] = []
    for layer, secret in zip(publication.layers, half._secret, strict=True):
        ratio = peak_ratio([secret.matrix[:, : layer.width]])
        # Of an all-zero core nothing is left to learn; any peak will do.
        found.append(
            Facts(publication.parameters.name, layer.rank, layer.norm_bound, math.ceil(1000 * max(ratio, 0.001)) / 1000)
        )
    return found


def rows_without_noise(parameters: ParameterSet, width: int, rank: int) -> tuple[int, int, int]:
    """Rows after which the best known attack has a layer within 10 %, within 1 % and exactly, without added noise.

    From shapes alone: the parameter set's noise floor, and the peak that is typical of adapters (``TYPICAL_PEAK``).
    """
    channel = Channel.of(parameters, width, rank, math.ceil(core_rms(width) * math.sqrt(width)), 0.0)
    ten, one, exact = (rows_until(channel, error) for error in (0.1, 0.01, 0.0))
    return ten, one, exact


def leakage_of(facts: Facts, width: int, noise: float, rows: int) -> Leakage:
    """The best known attack on a layer of ``width`` inputs after ``rows`` rows under answer noise δ = ``noise``.

    Raises ``ParameterError`` for a parameter set that this version does not know.
    """
    return leakage(_channel(facts, width, noise), rows)


def rows_until_learned(facts: Facts, width: int, noise: float) -> int:
    """Rows after which a layer counts as learned: the best known attack has it within 10 %, or there are ``width``.

    Raises ``ParameterError`` as ``leakage_of`` does.
    """
    try:
        return min(width, rows_until(_channel(facts, width, noise), LEARNED))
    except OverflowError:
        return width


def _channel(facts: Facts, width: int, noise: float) -> Channel:
    parameters = parameter_set(facts.parameters, allow_insecure=True)
    return Channel.of(parameters, width, facts.rank, facts.norm_bound, noise, facts.peak_ratio)
