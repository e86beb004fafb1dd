"""The controls at the top of the report: what must hold before any figure means anything."""

from dataclasses import dataclass

from splitveil.report.measurements import NONE, ORACLE, Measurements
from splitveil.report.numbers import counted, percent
from splitveil.report.standing import Standing, against_floor


@dataclass(frozen=True)
class Control:
    """One control: ``state`` is "pass", "fail" or "missing"."""

    name: str
    state: str
    short: str
    """What it found, in a few words."""
    value: str
    meaning: str


def controls(m: Measurements) -> list[Control]:
    """The scoring path, the level of chance, and that some attack works at all."""
    return [_oracle(m), _floor(m), _works(m)]


def broken(m: Measurements) -> list[str]:
    """Reasons why no figure of this report may be trusted, found in its rows."""
    return [
        f"the true tokens, sent through the scoring of {row.setting.data} after block {row.cut} ({row.defence}), "
        f"scored {percent(row.cell.value)} instead of 100 %: the scoring is wrong"
        for row in m.rows
        if row.attack == ORACLE and row.metric == "token_accuracy" and row.cell.measured and row.cell.value != 1.0
    ]


def _oracle(m: Measurements) -> Control:
    name = "The truth scores 100 %"
    meaning = "The true tokens go through the whole scoring path. Anything but 100 % means that the scoring is broken."
    cells = [r.cell for r in m.rows if r.attack == ORACLE and r.metric == "token_accuracy"]
    measured = [cell.value for cell in cells if cell.measured]
    if not measured:
        return Control(name, "missing", "truth not scored", "not measured", meaning)
    state = "pass" if min(measured) == 1.0 else "fail"
    worst = percent(min(measured))
    return Control(name, state, f"truth scores {worst}", f"{worst} in {counted(len(measured), 'cell')}", meaning)


def _floor(m: Measurements) -> Control:
    name = "The floor: guessing without looking"
    meaning = (
        "Tokens drawn as often as they occur in the attacker’s own text, whatever crosses. "
        "An attack that scores no more than this has learnt nothing from the crossing."
    )
    values = [
        cell.value
        for setting in m.settings
        for cut in m.cuts(setting)
        for defence in m.defences
        if (cell := m.floor(setting, cut, defence)).measured
    ]
    if not values:
        return Control(name, "missing", "no floor", "not measured", meaning)
    low, high = percent(min(values)), percent(max(values))
    value = low if low == high else f"{low} to {high}"
    return Control(name, "pass", f"floor {value}", value, meaning)


def _works(m: Measurements) -> Control:
    name = "The attacks work unprotected"
    meaning = "Attacks that beat the floor on the unprotected crossing. One that never does says nothing of a defence."
    if not m.attacks or NONE not in m.defences:
        return Control(name, "missing", "nothing unprotected", "no attack on the unprotected crossing", meaning)
    able = [
        attack
        for attack in m.attacks
        if any(
            against_floor(m.cell(setting, cut, attack), m.floor(setting, cut)).standing is Standing.ABOVE
            for setting in m.settings
            for cut in m.cuts(setting)
        )
    ]
    value = f"{len(able)} of {len(m.attacks)}"
    state = "pass" if able else "fail"
    return Control(name, state, f"attacks above the floor: {value}", f"{value} above the floor", meaning)
