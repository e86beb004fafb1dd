"""What a report is told besides its rows: the names, summaries and circumstances of one audit."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from splitveil.report.learning import Learnt
from splitveil.report.prices import Price

SETTINGS = {
    "prompts": "prompts attacked",
    "tokens": "tokens of a prompt, at most",
    "budget_seconds": "seconds to learn, for each attack at each cut",
    "budget_steps": "gradient steps to learn, at most",
    "seed": "seed",
}


@dataclass(frozen=True)
class AttackInfo:
    """How an attack describes itself."""

    summary: str = ""
    needs: tuple[str, ...] = ()
    source: str = ""
    version: str = ""


@dataclass(frozen=True)
class Correlation:
    """Rank correlation of an estimator's profile with the attacks' scores; NaN with a reason where there is none."""

    estimator: str
    rho: float
    low: float
    high: float
    points: int
    reason: str
    p_value: float


@dataclass(frozen=True)
class Meta:
    """The ``meta`` of ``write_report``, with every part optional but the title."""

    title: str
    model: str = ""
    blocks: int | None = None
    date: str = ""
    shadow: str = ""
    attackers: str = ""
    """What the attackers have and lack of the victims' device, where it is not simply the same."""
    command: str = ""
    data: Mapping[str, str] = field(default_factory=dict)
    """Data set → what is known of it."""
    versions: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    invalid: tuple[str, ...] = ()
    attacks: Mapping[str, AttackInfo] = field(default_factory=dict)
    defences: Mapping[str, str] = field(default_factory=dict)
    prices: Mapping[str, Price] = field(default_factory=dict)
    """Defence → what it costs."""
    correlation: tuple[Correlation, ...] = ()
    estimators: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Estimator → "applies", when its figure may be believed, and "source"."""
    learning: tuple[Learnt, ...] = ()
    """How the attackers learnt, where they kept that."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """What else a run was told: prompts, tokens, seed, seconds to learn."""

    @staticmethod
    def of(meta: Mapping[str, Any]) -> "Meta":
        """From plain dictionaries, as a JSON file holds them."""
        blocks = meta.get("blocks")
        return Meta(
            title=str(meta["title"]),
            model=str(meta.get("model", "")),
            blocks=None if blocks is None else int(blocks),
            date=str(meta.get("date", "")),
            shadow=str(meta.get("shadow", "")),
            attackers=str(meta.get("attackers", "")),
            command=str(meta.get("command", "")),
            data=_described(meta.get("data")),
            versions=_words(meta.get("versions")),
            digests=_words(meta.get("digests")),
            invalid=tuple(str(reason) for reason in meta.get("invalid") or ()),
            attacks={str(name): _attack(info) for name, info in (meta.get("attacks") or {}).items()},
            defences=_words(meta.get("defences")),
            prices={str(name): Price.of(str(name), price) for name, price in (meta.get("prices") or {}).items()},
            estimators={str(name): _words(info) for name, info in (meta.get("estimators") or {}).items()},
            learning=tuple(Learnt.of(entry) for entry in meta.get("learning") or ()),
            settings={words: str(meta[name]) for name, words in SETTINGS.items() if name in meta},
            correlation=tuple(_correlation(entry) for entry in meta.get("correlation") or ()),
        )


def _words(mapping: Mapping[Any, Any] | None) -> dict[str, str]:
    return {str(key): str(value) for key, value in (mapping or {}).items()}


def _described(data: Mapping[Any, Any] | Sequence[Any] | str | None) -> dict[str, str]:
    if isinstance(data, Mapping):
        return _words(data)
    names = [data] if isinstance(data, str) else data or []
    return {str(name): "" for name in names}


def _attack(info: Mapping[str, Any]) -> AttackInfo:
    return AttackInfo(
        summary=str(info.get("summary", "")),
        needs=tuple(sorted(str(need) for need in info.get("needs") or ())),
        source=str(info.get("source", "")),
        version=str(info.get("version", "")),
    )


def _correlation(entry: Mapping[str, Any]) -> Correlation:
    names = ("rho", "low", "high", "p_value")
    rho, low, high, p_value = (math.nan if entry.get(name) is None else float(entry[name]) for name in names)
    return Correlation(
        str(entry["estimator"]), rho, low, high, int(entry.get("points") or 0), str(entry.get("reason") or ""), p_value
    )
