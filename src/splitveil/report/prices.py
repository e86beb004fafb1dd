"""What defences cost: numbers from an audit, and the words that a report makes of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from splitveil.errors import ConfigurationError
from splitveil.report.measurements import NONE, Setting
from splitveil.report.numbers import THIN, plain

WHOLE = "whole model on the device"


@dataclass(frozen=True)
class Point:
    """What a defence costs at one cut on one data set; NaN where nothing was measured, and ``reason`` says why."""

    perplexity: float = math.nan
    undefended: float = math.nan
    """Perplexity of the whole undefended model on the same tokens."""
    microseconds: float = math.nan
    """A token, for protecting."""
    reason: str = ""

    @property
    def ratio(self) -> float:
        """Perplexity relative to the undefended model's."""
        return self.perplexity / self.undefended


UNKNOWN = Point(reason="its price was not measured")


@dataclass(frozen=True)
class Price:
    """What a defence costs everywhere it was tried."""

    bytes_a_token: float
    whole_model: bool
    """Whether the whole model runs on the device."""
    points: Mapping[tuple[str, int], Point]
    """By data set, "" for any, and cut."""

    def at(self, setting: Setting, cut: int) -> Point:
        """What it costs there."""
        return self.points.get((setting.data, cut)) or self.points.get(("", cut)) or UNKNOWN

    @staticmethod
    def of(name: str, raw: Mapping[str, Any]) -> "Price":
        """From a dictionary, as a JSON file holds it: ``bytes_a_token``, ``whole_model`` and ``points``, each with its
        ``data``, ``cut``, ``perplexity``, ``undefended``, ``microseconds`` and ``reason``; null is not measured.

        Raises ``ConfigurationError`` for anything else.
        """
        try:
            points = {
                (str(point.get("data") or ""), int(point["cut"])): Point(
                    perplexity=_number(name, point.get("perplexity")),
                    undefended=_number(name, point.get("undefended")),
                    microseconds=_number(name, point.get("microseconds")),
                    reason=str(point.get("reason") or ""),
                )
                for point in raw.get("points") or ()
            }
            return Price(_number(name, raw.get("bytes_a_token")), bool(raw.get("whole_model")), points)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(f"the price of {name[:80]!r} is not as expected: {error!r}") from None


@dataclass(frozen=True)
class Words:
    """A price in the defences' table: figures, with what stands beneath them in small letters."""

    perplexity: str
    perplexity_note: str
    size: str
    size_note: str
    latency: str


def priced(prices: Mapping[str, Price], defence: str, setting: Setting, cut: int) -> Words:
    """What a defence costs there, in words."""
    price = prices.get(defence, Price(math.nan, False, {}))
    point = price.at(setting, cut)
    note = point.reason
    if not note and not math.isnan(point.ratio):
        note = f"{plain(point.perplexity)} where the undefended model has {plain(point.undefended)}"
    if price.whole_model:
        note = f"{WHOLE}; {note}" if note else WHOLE
    size = f"{times(price.bytes_a_token / prices[NONE].bytes_a_token)} undefended" if NONE in prices else ""
    return Words(
        perplexity=times(point.ratio),
        perplexity_note=note,
        size=plain(price.bytes_a_token),
        size_note="" if math.isnan(price.bytes_a_token) else size,
        latency=plain(point.microseconds),
    )


def times(ratio: float) -> str:
    """ "× 1.31"."""
    if math.isnan(ratio):
        return plain(ratio)
    return f"×{THIN}{ratio:,.2f}" if ratio < 10 else f"×{THIN}{plain(ratio)}"


def _number(name: str, value: object) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ConfigurationError(f"the price of {name[:80]!r}: expected a number from 0 or null, got {value!r:.80}")
    return float(value)
