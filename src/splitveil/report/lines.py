"""Plots over blocks: recovery by each attack, and the information profile, drawn alike so that they read together."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from splitveil.report.measurements import INFORMATION, NONE, TEXT, Measurements, Setting
from splitveil.report.numbers import percent, plain, plain_range
from splitveil.report.svg import Plot, element, path

COLOURS = 8
WIDTH, HEIGHT = 400.0, 290.0
LEFT, TOP, BOTTOM = 44.0, 28.0, 44.0
LABEL_GAP = 14.0
LETTER = 7.6  # of a label in bold, in the widest of the fonts that a browser may choose
DODGE = 2.5
Scale = Callable[[float], float]  # from a figure to a place in the drawing
# Attacks stay apart without colour too: by dash and by marker.
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "12 4", "1 3", "6 2 1 2 1 2")


@dataclass(frozen=True)
class Point:
    """A figure at a block, with its interval (NaN: none) and its level of chance (NaN: none)."""

    block: int
    value: float
    low: float
    high: float
    chance: float = math.nan


@dataclass(frozen=True)
class Series:
    """One line of a plot; ``colour`` is the same for one attack in all plots of a report."""

    name: str
    colour: int
    points: Sequence[Point]


def recovery(m: Measurements, setting: Setting, name: str, span: tuple[int, int]) -> Plot:
    """Token accuracy of every attack on the unprotected crossing, by cut."""
    cuts = m.cuts(setting)
    series = []
    for colour, attack in enumerate(m.attacks):
        cells = [(cut, m.cell(setting, cut, attack, NONE)) for cut in cuts]
        points = [Point(cut, c.value, c.low, c.high) for cut, c in cells if c.measured]
        if points:
            series.append(Series(attack, colour, points))
    floor = [(cut, m.floor(setting, cut).value) for cut in cuts]
    floor = [(cut, value) for cut, value in floor if not math.isnan(value)]
    return draw(
        name,
        f"Tokens recovered on {setting.data}, by cut",
        series,
        span,
        Axis(1.0, [0, 0.25, 0.5, 0.75, 1.0], lambda v: percent(v, 0), "tokens recovered"),
        floor,
    )


def information(
    m: Measurements, setting: Setting, name: str, span: tuple[int, int], *, text: bool = False
) -> Plot | None:
    """Bits about the input token, or about the whole text, that each estimator finds in the crossing, by block.

    None if no estimator has a figure.
    """
    about = "text" if text else "token"
    series = []
    for colour, estimator in enumerate(m.estimators):
        if estimator.endswith(TEXT) is not text:
            continue
        points = [Point(b, c.value, c.low, c.high, chance) for b, c, chance in m.profile(setting, estimator)]
        if points:
            series.append(Series(estimator.removeprefix(INFORMATION).removesuffix(TEXT), colour, points))
    if not series:
        return None
    tops = [max(p.value, p.high if not math.isnan(p.high) else p.value) for s in series for p in s.points]
    top, ticks = nice(max(tops))
    return draw(
        name,
        f"Information about the {about} on {setting.data}, by block",
        series,
        span,
        Axis(top, ticks, plain_tick, f"bits about the {about}"),
        [],
    )


def estimator_words(name: str) -> str:
    """ "information:renyi-text" is "renyi, whole text"."""
    short = name.removeprefix(INFORMATION)
    return short.removesuffix(TEXT) + ", whole text" if short.endswith(TEXT) else short


@dataclass(frozen=True)
class Axis:
    """The vertical axis, from 0 to ``top``."""

    top: float
    ticks: Sequence[float]
    words: Callable[[float], str]
    label: str


def draw(
    name: str,
    title: str,
    series: Sequence[Series],
    span: tuple[int, int],
    axis: Axis,
    floor: Sequence[tuple[int, float]],
) -> Plot:
    """Lines over blocks ``span`` (first, last), labelled at their ends, with intervals as whiskers."""
    names = [s.name for s in series] + ["floor"] * bool(floor)
    right = WIDTH - min(180.0, 22 + LETTER * max((len(n) for n in names), default=0))
    bottom = HEIGHT - BOTTOM

    def x(block: float) -> float:
        first, last = span
        if first == last:
            return (LEFT + right) / 2
        return LEFT + 10 + (block - first) / (last - first) * (right - LEFT - 24)

    def y(value: float) -> float:
        return bottom - min(max(value / axis.top, 0.0), 1.0) * (bottom - TOP)

    body = [_frame(span, axis, right, bottom, x, y)]
    ends: list[tuple[float, float, str, str]] = []
    if floor:
        spots = [(x(b), y(v)) for b, v in floor]
        wide = spots if len(spots) > 1 else [(LEFT, spots[0][1]), (right, spots[0][1])]
        body.append(element("path", d=path(wide), class_="floor"))
        ends.append((x(floor[-1][0]), y(floor[-1][1]), "floor", "muted"))
    for place, s in enumerate(series):
        shift = DODGE * (place - (len(series) - 1) / 2)
        body.append(_line(s, shift, axis, x, y))
        last = s.points[-1]
        ends.append((x(last.block) + shift, y(last.value), s.name, f"fill{s.colour % COLOURS}"))
    body.extend(_labels(ends, right, bottom))
    return Plot(name, WIDTH, HEIGHT, title, _description(series, axis, floor), "".join(body))


def _frame(
    span: tuple[int, int],
    axis: Axis,
    right: float,
    bottom: float,
    x: Scale,
    y: Scale,
) -> str:
    parts = []
    for tick in axis.ticks:
        parts.append(element("line", x1=LEFT, x2=right, y1=y(tick), y2=y(tick), class_="grid"))
        parts.append(
            element("text", text=axis.words(tick), x=LEFT - 6, y=y(tick) + 4, text_anchor="end", class_="muted")
        )
    first, last = span
    step = max(1, math.ceil((last - first) / 8))
    for block in range(first, last + 1, step):
        parts.append(element("line", x1=x(block), x2=x(block), y1=bottom, y2=bottom + 4, class_="axis"))
        parts.append(element("text", text=str(block), x=x(block), y=bottom + 17, text_anchor="middle", class_="muted"))
    parts.append(element("line", x1=LEFT, x2=right, y1=bottom, y2=bottom, class_="axis"))
    parts.append(
        element(
            "text", text="cut after block", x=x((first + last) / 2), y=HEIGHT - 8, text_anchor="middle", class_="muted"
        )
    )
    parts.append(element("text", text=axis.label, x=4.0, y=12.0, class_="muted"))
    return "".join(parts)


def _line(s: Series, shift: float, axis: Axis, x: Scale, y: Scale) -> str:
    colour = s.colour % COLOURS
    stroke, fill = f"stroke{colour}", f"fill{colour}"
    parts = []
    chance = [(x(p.block), y(p.chance)) for p in s.points if not math.isnan(p.chance)]
    if chance:
        parts.append(element("path", d=path(chance), class_=f"chance {stroke}"))
    line = path((x(p.block) + shift, y(p.value)) for p in s.points)
    parts.append(element("path", d=line, class_=f"line {stroke}", stroke_dasharray=DASHES[colour]))
    for p in s.points:
        at = x(p.block) + shift
        if not math.isnan(p.low) and not math.isnan(p.high):
            parts.append(element("line", x1=at, x2=at, y1=y(p.low), y2=y(p.high), class_=f"whisker {stroke}"))
        interval = plain_range(p.low, p.high)
        words = f"{s.name}, block {p.block}: {plain(p.value)}" + (f" ({interval})" if interval else "")
        parts.append(
            element("path", element("title", text=words), d=marker(colour, at, y(p.value)), class_=f"mark {fill}")
        )
    return "".join(parts)


def _labels(ends: list[tuple[float, float, str, str]], right: float, bottom: float) -> list[str]:
    """Names beside the ends of their lines, pushed apart until none covers another."""
    parts = []
    ordered = sorted(ends, key=lambda end: end[1])
    places = [end[1] for end in ordered]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + LABEL_GAP)
    overflow = (places[-1] - bottom) if places else 0
    if overflow > 0:
        places[-1] -= overflow
        for i in range(len(places) - 2, -1, -1):
            places[i] = min(places[i], places[i + 1] - LABEL_GAP)
    for (end_x, end_y, name, colour), place in zip(ordered, places, strict=True):
        leader = element("line", x1=end_x + 5, y1=end_y, x2=right + 8, y2=place, class_="leader axis")
        parts.append(leader + element("text", text=name, x=right + 11, y=place + 4, class_=f"{colour} name"))
    return parts


def marker(kind: int, x: float, y: float) -> str:
    """The ``d`` of a small closed shape around (x, y); eight shapes."""
    r = 4.5
    corners = {1: 4, 2: 3, 3: 4, 5: 3, 6: 5, 7: 6}.get(kind)
    if corners is None:
        size = r if kind == 0 else r - 1
        return f"M{x - size:.2f} {y:.2f}a{size} {size} 0 1 0 {2 * size} 0a{size} {size} 0 1 0 {-2 * size} 0Z"
    start = {1: math.pi / 4, 2: -math.pi / 2, 5: math.pi / 2}.get(kind, -math.pi / 2)
    angles = [start + 2 * math.pi * i / corners for i in range(corners)]
    return path((x + 1.15 * r * math.cos(a), y + 1.15 * r * math.sin(a)) for a in angles) + "Z"


def nice(top: float) -> tuple[float, list[float]]:
    """An axis' end at or above ``top`` and four to six ticks from 0."""
    if not top > 0:
        return 1.0, [0.0, 0.5, 1.0]
    size = 10.0 ** math.floor(math.log10(top / 4))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size * 5 >= top)
    count = math.ceil(top / step - 1e-9)
    return count * step, [i * step for i in range(count + 1)]


def plain_tick(value: float) -> str:
    """A tick without digits that say nothing."""
    return f"{value:.6g}"


def _description(series: Sequence[Series], axis: Axis, floor: Sequence[tuple[int, float]]) -> str:
    lines = [
        f"{s.name}: " + ", ".join(f"{axis.words(p.value)} after block {p.block}" for p in s.points) for s in series
    ]
    if floor:
        lines.append("floor: " + ", ".join(f"{axis.words(v)} after block {b}" for b, v in floor))
    return f"{axis.label}. " + "; ".join(lines)
