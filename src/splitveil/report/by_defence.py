"""What the best adapted attack still recovers under each defence, all cuts on one line."""

import math
from dataclasses import dataclass

from splitveil.report.measurements import NONE, Cell, Measurements, Setting
from splitveil.report.numbers import percent
from splitveil.report.standing import Standing, defended
from splitveil.report.svg import Plot, element

WIDTH, ROW, TOP = 400.0, 50.0, 6.0
LEFT, RIGHT = 12.0, 388.0
RADIUS, LETTER = 8.5, 10.0
COLOURS = {Standing.FLOOR: "at-floor", Standing.ABOVE: "above-floor", Standing.UNKNOWN: "open"}


@dataclass(frozen=True)
class Dot:
    """The best attack at one cut under one defence."""

    cut: int
    attack: str
    cell: Cell
    colour: str


def by_defence(m: Measurements, setting: Setting, name: str) -> Plot | None:
    """One row a defence, one numbered dot a cut; None if only one defence, or only one cut, was measured."""
    rows = []
    for defence in m.defences:
        dots = [
            Dot(cut, *ranked[0], _colour(m, setting, cut, defence))
            for cut in m.cuts(setting)
            if (ranked := m.ranked(setting, cut, defence))
        ]
        if dots:
            rows.append((defence, dots))
    if len(rows) < 2 or len(m.cuts(setting)) < 2:
        return None
    rows.sort(key=lambda row: -max(dot.cell.value for dot in row[1]))
    bottom = TOP + ROW * len(rows)
    floors = [f.value for cut in m.cuts(setting) if (f := m.floor(setting, cut)).measured]
    body = [_axis(bottom)]
    for i, (defence, dots) in enumerate(rows):
        y = TOP + ROW * i + 34
        body.append(element("text", text=defence, x=LEFT, y=y - 16, class_="name"))
        body.append(element("line", x1=LEFT, x2=RIGHT, y1=y, y2=y, class_="axis"))
        if floors:
            at = _x(max(floors))
            body.append(element("line", x1=at, x2=at, y1=y - 9, y2=y + 12, class_="floor"))
        body.extend(_pill(defence, group, y) for group in _grouped(dots))
    title = f"What the best adapted attack recovers under each defence, {setting.data}"
    words = [f"{defence}: " + ", ".join(_words(dot) for dot in dots) for defence, dots in rows]
    return Plot(name, WIDTH, bottom + 40, title, "; ".join(words), "".join(body))


def _colour(m: Measurements, setting: Setting, cut: int, defence: str) -> str:
    return "plainly" if defence == NONE else COLOURS[defended(m, setting, cut, defence).standing]


def _axis(bottom: float) -> str:
    parts = []
    for tick, anchor in ((0.0, "start"), (0.25, "middle"), (0.5, "middle"), (0.75, "middle"), (1.0, "end")):
        at = {"start": 4.0, "end": WIDTH - 4}.get(anchor, _x(tick))
        parts.append(element("line", x1=_x(tick), x2=_x(tick), y1=bottom - 4, y2=bottom, class_="axis"))
        parts.append(element("text", text=percent(tick, 0), x=at, y=bottom + 14, text_anchor=anchor, class_="muted"))
    words = "tokens recovered by the best attack"
    parts.append(element("text", text=words, x=_x(0.5), y=bottom + 32, text_anchor="middle", class_="muted"))
    return "".join(parts)


def _grouped(dots: list[Dot]) -> list[list[Dot]]:
    """Dots that would cover each other and say the same share one outline."""
    out: list[list[Dot]] = []
    for dot in sorted(dots, key=lambda dot: dot.cell.value):
        last = out[-1][-1] if out else None
        near = last and _x(dot.cell.value) - _x(last.cell.value) < 2 * RADIUS + LETTER * (len(out[-1]) - 1)
        if near and last and last.colour == dot.colour:
            out[-1].append(dot)
        else:
            out.append([dot])
    return out


def _pill(defence: str, group: list[Dot], y: float) -> str:
    label = " ".join(str(dot.cut) for dot in sorted(group, key=lambda dot: dot.cut))
    half = RADIUS + LETTER / 2 * (len(label) - 1) * 0.6
    middle = sum(_x(dot.cell.value) for dot in group) / len(group)
    middle = min(max(middle, 1 + half), WIDTH - 1 - half)
    parts = [
        element("line", x1=_x(d.cell.low), x2=_x(d.cell.high), y1=y, y2=y, class_=f"whisker {d.colour}")
        for d in group
        if not math.isnan(d.cell.low) and not math.isnan(d.cell.high)
    ]
    title = element("title", text=f"{defence}: " + ", ".join(_words(dot) for dot in group))
    x, width, height = middle - half, 2 * half, 2 * RADIUS
    colour = f"mark {group[0].colour}"
    parts.append(element("rect", title, x=x, y=y - RADIUS, width=width, height=height, rx=RADIUS, class_=colour))
    parts.append(element("text", text=label, x=middle, y=y + 4, class_="number"))
    return "".join(parts)


def _words(dot: Dot) -> str:
    return f"{percent(dot.cell.value)} after block {dot.cut} ({dot.attack})"


def _x(share: float) -> float:
    return LEFT + RADIUS + min(max(share, 0.0), 1.0) * (RIGHT - LEFT - 2 * RADIUS)
