"""How the attackers learnt: one that was still getting better when its time was up would recover more with more."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from splitveil.report.numbers import THIN, listed, percent, plain


@dataclass(frozen=True)
class Learnt:
    """One attacker; None for what does not apply to it, or was not recorded."""

    attack: str
    cut: int
    defence: str
    seconds: float
    steps: int | None
    halfway: float | None
    """The best validation score in the first half of the steps."""
    validation: float | None
    plateau: bool | None
    """Whether it ended because its validation score had flattened."""
    rising: bool
    queries: int | None
    """Texts that the device ran for it."""

    @staticmethod
    def of(raw: Mapping[str, Any]) -> "Learnt":
        return Learnt(
            str(raw["attack"]),
            int(raw["cut"]),
            str(raw["defence"]),
            float(raw["seconds"]),
            _whole(raw.get("steps")),
            _share(raw.get("halfway")),
            _share(raw.get("validation")),
            None if raw.get("plateau") is None else bool(raw["plateau"]),
            bool(raw.get("rising")),
            _whole(raw.get("queries")),
        )


@dataclass(frozen=True)
class Line:
    """A table row, in words."""

    attack: str
    cut: int
    defence: str
    figures: list[str]
    """Texts asked for, steps, seconds, validation halfway and in the end."""
    ended: str
    rising: bool


def lines(learnt: Sequence[Learnt]) -> list[Line]:
    return [
        Line(
            one.attack,
            one.cut,
            one.defence,
            [
                _count(one.queries),
                _count(one.steps),
                plain(one.seconds),
                "" if one.halfway is None else percent(one.halfway),
                "" if one.validation is None else percent(one.validation),
            ],
            _ended(one),
            one.rising,
        )
        for one in learnt
    ]


def still_rising(learnt: Sequence[Learnt]) -> str:
    """A sentence on the attackers whose time was up too soon; nothing where there are none."""
    counts = []
    for attack in dict.fromkeys(one.attack for one in learnt if one.rising):
        mine = [one.rising for one in learnt if one.attack == attack]
        counts.append(f"{attack} ({sum(mine)} of {len(mine)} times)")
    if not counts:
        return ""
    return (
        f"Still getting better when learning ended: {listed(counts)}. With more time, more than is shown here may be "
        "recovered."
    )


def _ended(one: Learnt) -> str:
    if one.validation is None:
        return ""
    if one.validation == 1:
        return "every token right"
    if one.plateau:
        return "had flattened"
    return "still rising" if one.rising else "not recorded" if one.plateau is None else "time was up"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}".replace(",", THIN)


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)


def _share(value: Any) -> float | None:
    return None if value is None else float(value)
