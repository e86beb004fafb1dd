"""What a ledger has to keep of a private layer so that its leakage can be computed later, without the weights.

The vendor's to keep, not to publish: κ_c and the curves of directions are figures of the weights. They tell how much of
a core lies where, and nothing of its entries.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from splitveil.errors import DataError
from splitveil.lattice.parameters import ParameterSet, parameter_set
from splitveil.private.columns import Channel, peak_ratio
from splitveil.private.core import core_rms
from splitveil.private.directions import ByLayer, Directions
from splitveil.private.engine import ServedHalf
from splitveil.private.lattice_served import LatticeServed
from splitveil.private.leakage import LEARNED, Leakage, leakage, rows_until, rows_until_along
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
    weights: str = ""
    """Which these are: the beginning of their folder's digest; empty where that is not known."""
    directions: tuple[Directions, ...] = ()
    """What queries along directions are worth, by order of asking; none where the vendor did not measure it."""

    def __str__(self) -> str:
        # Without a mention of directions where there are none, as before there were any.
        return json.dumps(
            {name: value for name, value in asdict(self).items() if value not in ((), "")}, sort_keys=True
        )

    @classmethod
    def read(cls, text: str) -> "Facts":
        """What ``str`` wrote. Raises ``DataError`` for anything else."""
        try:
            values = json.loads(text)
            values["directions"] = read_directions(values.get("directions", []))
            found = cls(**values)
            plain = (found.parameters, found.rank, found.norm_bound, found.peak_ratio, found.weights)
            kinds = [type(value) for value in plain]
        except (ValueError, TypeError, AttributeError):
            kinds = []
        if kinds != [str, int, int, float, str] or not (
            found.rank > 0 and found.norm_bound > 0 and math.isfinite(found.peak_ratio) and found.peak_ratio > 0
        ):
            raise DataError(f"the ledger's facts of a layer cannot be read: {text[:200]!r}")
        return found


def read_directions(found: Any) -> tuple[Directions, ...]:
    """From what JSON makes of some. Raises ``ValueError`` for anything else."""
    if not isinstance(found, list):
        raise ValueError("a list of curves was expected")
    return tuple(map(_read_curve, found))


def _read_curve(found: Any) -> Directions:
    if not isinstance(found, dict) or found.keys() != {"counts", "outside", "peak"}:
        raise ValueError("an object with counts, outside and peak was expected")
    counts, outside, peak = found["counts"], found["outside"], found["peak"]
    if not (isinstance(counts, list) and isinstance(outside, list) and len(counts) == len(outside)):
        raise ValueError("as many counts as shares were expected")
    if not all(type(value) is int for value in counts) or not all(type(value) is float for value in (*outside, peak)):
        raise ValueError("whole counts, and shares and a peak with a point were expected")
    return Directions(tuple(counts), tuple(outside), peak)


def facts_of(
    half: ServedHalf, publication: Publication, weights: str = "", directions: ByLayer | None = None
) -> list[Facts | None]:
    """One a layer, in the publication's order; None for engines against which no attack was measured.

    ``weights`` tells one set of weights from another, and ``directions`` is what was measured of these.
    """
    if not isinstance(half, LatticeServed):
        return [None] * len(publication.layers)
    found: list[Facts | None] = []
    for layer, secret in zip(publication.layers, half._secret, strict=True):
        ratio = peak_ratio([secret.matrix[:, : layer.width]])
        # Of an all-zero core nothing is left to learn; any peak will do.
        peak = math.ceil(1000 * max(ratio, 0.001)) / 1000
        own = (directions or {}).get(layer.outputs[0][0], ())
        found.append(Facts(publication.parameters.name, layer.rank, layer.norm_bound, peak, weights, own))
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
    return leakage(_channel(facts, width, noise), rows, facts.directions)


def rows_until_learned(layers: Sequence[Facts], width: int, noise: float) -> int:
    """Rows after which one of some layers of ``width`` inputs counts as learned: the best known attack has it within
    10 %, or there are ``width``.

    Asked in columns, the one with the flattest core stands for all, which falls first: with noise added, each would
    take up to a second to compute. Raises ``ParameterError`` as ``leakage_of`` does.
    """
    flattest = min(layers, key=lambda facts: facts.peak_ratio)
    try:
        found = [width, rows_until(_channel(flattest, width, noise), LEARNED)]
    except OverflowError:
        found = [width]
    along = [rows_until_along(_channel(one, width, noise), own, LEARNED) for one in layers for own in one.directions]
    return min([*found, *(rows for rows in along if rows is not None)])


def _channel(facts: Facts, width: int, noise: float) -> Channel:
    parameters = parameter_set(facts.parameters, allow_insecure=True)
    return Channel.of(parameters, width, facts.rank, facts.norm_bound, noise, facts.peak_ratio)
