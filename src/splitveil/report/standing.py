"""Where an attack stands against the level of chance, by one rule for the whole report."""

import math
from dataclasses import dataclass
from enum import StrEnum

from splitveil.report.measurements import NONE, SCORE, Cell, Measurements, Setting
from splitveil.report.numbers import counted, listed, percent

POWER = 0.02
"""An interval must be able to show this much above the floor."""
LEAST = 30
"""Prompts that a bootstrap needs. Where nothing was recovered at all, it has no width, however few they are."""


class Standing(StrEnum):
    """What can be said of a figure beside the floor."""

    FLOOR = "at the floor"
    ABOVE = "above the floor"
    UNKNOWN = "cannot be told"


@dataclass(frozen=True)
class Judgement:
    """A standing with its reason, in words for the report."""

    standing: Standing
    reason: str


def against_floor(cell: Cell, floor: Cell) -> Judgement:
    """Above: the intervals do not meet. At the floor: the interval contains the floor or lies below it, and ends no
    more than two points above it, with ``LEAST`` prompts or more. Anything between cannot be told.
    """
    if not cell.measured or not floor.measured:
        return Judgement(Standing.UNKNOWN, (cell if not cell.measured else floor).reason)
    if any(math.isnan(end) for end in (cell.low, cell.high, floor.high)):
        return Judgement(Standing.UNKNOWN, "measured without an interval")
    if cell.low > floor.high:
        return Judgement(Standing.ABOVE, f"{percent(cell.value)} where guessing reaches {percent(floor.value)}")
    if cell.low > floor.value:
        return Judgement(Standing.UNKNOWN, "its interval meets the floor's, but does not contain the floor")
    if cell.prompts < LEAST or cell.high - floor.value > POWER:
        return Judgement(
            Standing.UNKNOWN, f"{counted(cell.prompts, 'prompt')} are too few to see two points above the floor"
        )
    return Judgement(Standing.FLOOR, f"{percent(cell.value)} where guessing reaches {percent(floor.value)}")


def defended(m: Measurements, setting: Setting, cut: int, defence: str) -> Judgement:
    """Whether a defence brings every attack to the floor at one cut.

    Attacks that fail on the unprotected crossing prove nothing by failing here, and are left out, unless they rise
    above the floor; every attack that succeeds there must have been measured here and be at the floor.
    """
    floor, plain_floor = m.floor(setting, cut, defence), m.floor(setting, cut, NONE)
    for attack, cell in m.ranked(setting, cut, defence):
        here = against_floor(cell, floor)
        if here.standing is Standing.ABOVE:
            return Judgement(Standing.ABOVE, f"{attack} recovers {here.reason}")
    able, stuck, open_ = [], [], []
    for attack in m.attacks:
        here = against_floor(m.cell(setting, cut, attack, defence, SCORE), floor)
        if against_floor(m.cell(setting, cut, attack, NONE, SCORE), plain_floor).standing is not Standing.ABOVE:
            continue
        able.append(attack)
        if here.standing is Standing.FLOOR:
            stuck.append(attack)
        else:
            open_.append(f"{attack}: {here.reason}")
    if open_:
        return Judgement(Standing.UNKNOWN, "; ".join(open_))
    if not able:
        return Judgement(Standing.UNKNOWN, "no attack of this audit succeeds on the unprotected crossing here")
    return Judgement(Standing.FLOOR, f"{listed(stuck)}: at chance here, successful on the unprotected crossing")
