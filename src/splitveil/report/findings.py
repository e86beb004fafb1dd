"""What the figures of a frontier allow to say, in sentences; where they allow nothing, that."""

import math
from collections.abc import Sequence

from splitveil.report.frontier import Mark
from splitveil.report.labels import shortened
from splitveil.report.measurements import NONE
from splitveil.report.numbers import in_prose, listed, plain
from splitveil.report.prices import WHOLE, times
from splitveil.report.standing import Standing

MOST = 60
"""Letters of a defence's name in a sentence."""
BOUNDS = (1.1, 2.0)
"""Perplexities, relative to the undefended model's, up to which the least that is recovered is named."""
FREE = 1.01
"""A perplexity up to this many times the undefended model's is called none lost."""


def findings(found: Sequence[Mark], invalid: Sequence[str]) -> list[str]:
    """Sentences on one cut. Two figures are called different only where their intervals do not meet."""
    if invalid:
        return ["Nothing: this report is invalid."]
    plain_mark = next((mark for mark in found if mark.defence == NONE), None)
    protected = [mark for mark in found if mark.defence != NONE]
    if plain_mark is None or plain_mark.doubt:
        reason = plain_mark.doubt if plain_mark else "no attack on the unprotected crossing has a result"
        return [f"Nothing: {reason}."]
    sure = [mark for mark in protected if not mark.doubt]
    out = _floor(sure, plain_mark) if sure else []
    out += _useless(sure, plain_mark)
    out += _least(sure, plain_mark)
    out += _beaten(sure)
    out += [f"Nothing can be said of {_name(mark)}: {mark.doubt}." for mark in protected if mark.doubt]
    return out


def _floor(sure: Sequence[Mark], plain_mark: Mark) -> list[str]:
    at_floor = [mark for mark in sure if mark.standing is Standing.FLOOR]
    open_ = [_name(mark) for mark in sure if mark.standing is Standing.UNKNOWN]
    free = [mark for mark in at_floor if mark.ratio <= FREE]
    beside = f" Of {listed(open_)} it cannot be told whether the floor is reached." if open_ else ""
    if not at_floor:
        return ["No defence here is shown to bring every attack to the floor." + beside]
    if not free:
        unknown = [_name(mark) for mark in at_floor if math.isnan(mark.ratio)]
        if unknown:
            return [f"{listed(unknown)}: at the floor; what that costs in perplexity was not measured.{beside}"]
        cheapest = min(at_floor, key=lambda mark: mark.ratio)
        return [
            "No defence here is both at the floor and free: the least that the floor costs is "
            f"{times(cheapest.ratio)} the perplexity ({_name(cheapest)}).{beside}"
        ]
    costs = "; ".join(f"{_name(mark)} ({_cost(mark, plain_mark)})" for mark in free)
    return [f"No defence here is both at the floor and free of a loss in perplexity, except {costs}.{beside}"]


def _cost(mark: Mark, plain_mark: Mark) -> str:
    parts = [WHOLE] if mark.whole_model else []
    if not math.isnan(mark.size) and not math.isnan(plain_mark.size):
        parts.append(f"{times(mark.size / plain_mark.size)} the bytes of the undefended crossing")
    if not math.isnan(mark.microseconds):
        parts.append(f"{plain(mark.microseconds)} µs a token")
    return ", ".join(parts) or "its other prices were not measured"


def _useless(sure: Sequence[Mark], plain_mark: Mark) -> list[str]:
    same = [mark for mark in sure if mark.cell.high >= plain_mark.cell.low and mark.standing is not Standing.FLOOR]
    if not same:
        return []
    names = listed([_name(mark) for mark in same])
    return [
        f"Under {names} it cannot be shown that less is recovered than without a defence "
        f"({in_prose(plain_mark.cell.value)}): the intervals meet."
    ]


def _least(sure: Sequence[Mark], plain_mark: Mark) -> list[str]:
    """Of what the upper blocks can read: the strongest defence up to a price, with those that may be as strong."""
    out: list[str] = []
    last = None
    for most in BOUNDS:
        able = [mark for mark in sure if mark.ratio <= most and not mark.whole_model]
        best = min(able, key=lambda mark: mark.cell.value, default=None)
        if best is None or best is last:
            continue
        last = best
        start = f"With the model cut in two, and at most {times(most)} the perplexity, "
        if best.cell.high >= plain_mark.cell.low:
            out.append(start + "no defence here is shown to leave less than none does.")
            continue
        tied = [_name(mark) for mark in able if mark.cell.low <= best.cell.high and mark is not best]
        also = f", or {listed(tied)}, whose intervals meet its own" if tied else ""
        out.append(f"{start}the least that is left is {in_prose(best.cell.value)} ({_name(best)}{also}).")
    return out


def _beaten(sure: Sequence[Mark]) -> list[str]:
    """Defences that another beats: surely less recovered, at no higher perplexity and no more bytes."""
    out = []
    for mark in sure:
        better = [
            other
            for other in sure
            if other.cell.high < mark.cell.low
            and other.ratio <= mark.ratio
            and other.size <= mark.size
            and other.whole_model == mark.whole_model
        ]
        if better:
            best = min(better, key=lambda other: other.cell.value)
            out.append((_name(best), _name(mark)))
    by_best: dict[str, list[str]] = {}
    for best_name, name in out:
        by_best.setdefault(best_name, []).append(name)
    return [
        f"{best_name} leaves less than {listed(names)}, at no higher perplexity and with no more bytes."
        for best_name, names in by_best.items()
    ]


def _name(mark: Mark) -> str:
    return shortened(mark.defence, MOST)
