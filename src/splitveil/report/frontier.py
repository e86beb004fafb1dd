"""The frontier at one cut: what the best adapted attack recovers under each defence, against what the defence costs."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from splitveil.report import labels
from splitveil.report.lines import marker, plain_tick
from splitveil.report.measurements import NONE, Cell, Measurements, Setting
from splitveil.report.numbers import THIN, percent, percent_range, plain
from splitveil.report.prices import Price, times
from splitveil.report.standing import LEAST, Standing, against_floor, defended
from splitveil.report.svg import Plot, element, path
from splitveil.report.verdict import block

WIDTH, HEIGHT, TALLER = 400.0, 300.0, 60.0
EASY, CROWDED = 8, 8.0
"""So many names find a place of themselves; for each one more, a plot is that much taller."""
LEFT, RIGHT, TOP, BOTTOM = 44.0, 394.0, 30.0, 44.0
INSET, RADIUS = 16.0, 6.0
DIGIT = 7.0  # of a tick's words, in the widest of the fonts that a browser may choose
QUICK = 0.1
"""Microseconds: what takes less is drawn there; a logarithm has no zero, and a clock no more precision."""
# Standing → (colour, kind of marker): told apart without colours, too.
LOOKS = {
    Standing.FLOOR: ("at-floor", 1),
    Standing.ABOVE: ("above-floor", 0),
    Standing.UNKNOWN: ("open", 3),
}


@dataclass(frozen=True)
class Mark:
    """One defence at one cut."""

    defence: str
    attack: str
    cell: Cell
    """Token accuracy of the best attack that has a result."""
    standing: Standing
    doubt: str
    """Why nothing may be concluded from it; empty if something may."""
    ratio: float
    """Perplexity relative to the undefended model's."""
    microseconds: float
    size: float
    """Bytes a token."""
    whole_model: bool


@dataclass(frozen=True)
class Kind:
    """One of the prices; what is below ``least`` or above ``most`` is drawn there; the axis includes ``reach``."""

    name: str
    label: str
    value: Callable[[Mark], float]
    words: Callable[[float], str]
    tick: Callable[[float], str]
    least: float = 0.0
    most: float = math.inf
    reach: float = 0.0


def _more(ratio: float) -> str:
    """ "+31 %"."""
    return f"+{100 * ratio:,.6g}{THIN}%"


KINDS = (
    Kind(
        "perplexity",
        "perplexity added, relative to the undefended model’s",
        lambda mark: mark.ratio - 1,
        lambda more: f"{times(1 + more)} the perplexity",
        _more,
        0.001,
        10.0,
        0.1,
    ),
    Kind(
        "latency",
        "µs added by protecting a token",
        lambda mark: mark.microseconds,
        lambda time: f"{plain(time)} µs a token",
        plain_tick,
        QUICK,
        reach=10.0,
    ),
    Kind(
        "bytes",
        "bytes a token on the wire",
        lambda mark: mark.size,
        lambda size: f"{plain(size)} bytes a token",
        lambda size: f"{size:,.6g}",
    ),
)


@dataclass(frozen=True)
class Panel:
    """One plot, and the defences that it cannot show."""

    plot: Plot
    absent: list[str]


def marks(m: Measurements, prices: Mapping[str, Price], setting: Setting, cut: int) -> list[Mark]:
    """Every defence that any attack has a result under; ``none`` among them."""
    ranked = m.ranked(setting, cut)
    plain_floor = m.floor(setting, cut)
    works = bool(ranked) and against_floor(ranked[0][1], plain_floor).standing is Standing.ABOVE
    out = []
    for defence in m.defences:
        best = m.ranked(setting, cut, defence)
        if not best:
            continue
        attack, cell = best[0]
        doubt = ""
        if not works:
            doubt = "no attack of this audit succeeds on the unprotected crossing"
        elif not (champion := m.cell(setting, cut, ranked[0][0], defence)).measured:
            doubt = f"{ranked[0][0]}, the best attack on the unprotected crossing, has no result: {champion.reason}"
        elif math.isnan(cell.low) or math.isnan(cell.high):
            doubt = "its recovery was measured without an interval"
        elif cell.prompts < LEAST:
            doubt = f"{cell.prompts} prompts are too few for an interval"
        price = prices.get(defence, Price(math.nan, False, {}))
        point = price.at(setting, cut)
        standing = Standing.ABOVE if defence == NONE else defended(m, setting, cut, defence).standing
        out.append(
            Mark(
                defence,
                attack,
                cell,
                standing,
                doubt,
                point.ratio,
                point.microseconds,
                price.bytes_a_token,
                price.whole_model,
            )
        )
    return out


def panels(found: Sequence[Mark], floor: Cell, setting: Setting, cut: int, name: str) -> list[Panel]:
    """One plot for each price that two defences or more have."""
    out = []
    for kind in KINDS:
        shown = [mark for mark in found if not math.isnan(kind.value(mark))]
        if len(shown) < 2:
            continue
        absent = [mark.defence for mark in found if math.isnan(kind.value(mark))]
        title = f"Tokens recovered against {kind.label}, {setting.data}, cut {block(cut)}"
        out.append(Panel(_draw(kind, shown, floor, title, f"{name}-{kind.name}"), absent))
    return out


def _draw(kind: Kind, shown: Sequence[Mark], floor: Cell, title: str, name: str) -> Plot:
    values = [min(max(kind.value(mark), kind.least), kind.most) for mark in shown]
    scale = Scale.of([*values, kind.reach] if kind.reach else values)
    short = [labels.shortened(mark.defence) for mark in shown]
    height = HEIGHT + CROWDED * max(0, len(shown) - EASY)
    while True:  # ends: with every turn there is more room, and nothing more to place
        bottom = height - BOTTOM
        spots = [(scale.x(v), _y(mark.cell.value, bottom)) for v, mark in zip(values, shown, strict=True)]
        frame = labels.Box(LEFT + 3, TOP - 10, RIGHT, bottom - 2)
        places = labels.place(short, spots, RADIUS, frame)
        if places is not None:
            break
        height += TALLER
    body = [_frame(kind, scale, bottom)]
    if floor.measured:
        y = _y(floor.value, bottom)
        body.append(element("line", x1=LEFT, x2=RIGHT, y1=y, y2=y, class_="floor"))
    body.append(_steps(values, shown, scale, bottom))
    for text, mark, spot, place in zip(short, shown, spots, places, strict=True):
        body.append(labels.drawn(text, mark.defence, spot, place))
    drawn = sorted(zip(values, shown, spots, strict=True), key=lambda one: one[1].standing is Standing.FLOOR)
    for _, mark, spot in drawn:
        body.append(_mark(kind, mark, spot, bottom))
    words = "; ".join(_words(kind, mark) for mark in shown)
    return Plot(name, WIDTH, height, title, words, "".join(body))


def _frame(kind: Kind, scale: "Scale", bottom: float) -> str:
    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _y(tick, bottom)
        parts.append(element("line", x1=LEFT, x2=RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(element("text", text=percent(tick, 0), x=LEFT - 6, y=y + 4, text_anchor="end", class_="muted"))
    for tick in scale.ticks():
        x = scale.x(tick)
        words = ("≤ " if tick <= kind.least else "≥ " if tick >= kind.most else "") + kind.tick(tick)
        parts.append(element("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="axis"))
        x = min(x, WIDTH - 2 - DIGIT / 2 * len(words))
        parts.append(element("text", text=words, x=x, y=bottom + 17, text_anchor="middle", class_="muted"))
    parts.append(element("line", x1=LEFT, x2=RIGHT, y1=bottom, y2=bottom, class_="axis"))
    middle = (LEFT + RIGHT) / 2
    parts.append(element("text", text=kind.label, x=middle, y=bottom + 35, text_anchor="middle", class_="muted"))
    parts.append(element("text", text="tokens recovered by the best attack", x=4.0, y=12.0, class_="muted"))
    return "".join(parts)


def _steps(values: Sequence[float], shown: Sequence[Mark], scale: "Scale", bottom: float) -> str:
    """The least that was recovered at each price or below it, as far as something may be concluded."""
    points: list[tuple[float, float]] = []
    sure = [(v, mark.cell.value) for v, mark in zip(values, shown, strict=True) if not mark.doubt]
    for value, recovered in sorted(sure):
        y = _y(recovered, bottom)
        if points and y <= points[-1][1]:
            continue
        if points:
            points.append((scale.x(value), points[-1][1]))
        points.append((scale.x(value), y))
    if not points:
        return ""
    return element("path", d=path([*points, (RIGHT, points[-1][1])]), class_="frontier")


def _mark(kind: Kind, mark: Mark, spot: tuple[float, float], bottom: float) -> str:
    colour, shape = ("plainly", 0) if mark.defence == NONE else LOOKS[mark.standing]
    x, y = spot
    parts = ""
    if not math.isnan(mark.cell.low) and not math.isnan(mark.cell.high):
        low, high = _y(mark.cell.low, bottom), _y(mark.cell.high, bottom)
        parts = element("line", x1=x, x2=x, y1=low, y2=high, class_=f"whisker {colour}")
    doubt = " doubt" if mark.doubt else ""
    title = element("title", text=_words(kind, mark))
    return parts + element("path", title, d=marker(shape, x, y), class_=f"mark {colour}{doubt}")


def _words(kind: Kind, mark: Mark) -> str:
    interval = percent_range(mark.cell.low, mark.cell.high)
    recovered = percent(mark.cell.value) + (f" ({interval})" if interval else "")
    doubt = f", but nothing follows from it: {mark.doubt}" if mark.doubt else ""
    return f"{mark.defence}: {recovered} by {mark.attack} at {kind.words(kind.value(mark))}{doubt}"


def _y(share: float, bottom: float) -> float:
    return bottom - min(max(share, 0.0), 1.0) * (bottom - TOP)


@dataclass(frozen=True)
class Scale:
    """A logarithmic axis."""

    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> "Scale":
        """Around positive numbers; wide enough that what is a few percent apart does not look far apart."""
        low, high = max(min(values), 1e-9), max(*values, 1e-9)
        if high / low < 1.2:
            middle = math.sqrt(low * high)
            low, high = middle / 1.1, middle * 1.1
        return Scale(low, high)

    def x(self, value: float) -> float:
        """Where a price is in the drawing."""
        share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return LEFT + INSET + min(share, 1.0) * (RIGHT - LEFT - 2 * INSET)

    def ticks(self) -> list[float]:
        """Two to seven round numbers: in equal steps where the axis is short, by their ratio where it is long."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        if self.high / self.low >= 8:
            for digits in ((1, 2, 5), (1, 3), (1,)):
                found = self._inside([digit * 10.0**decade for decade in decades for digit in digits])
                if len(found) <= 5:
                    return found
            return found[:: math.ceil(len(found) / 5)]
        size = 10.0 ** math.floor(math.log10(self.high - self.low))
        for step in (0.1 * size, 0.2 * size, 0.5 * size, size, 2 * size, 5 * size):
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            if last - first < 6:
                return [i * step for i in range(first, last + 1)]
        return [self.low, self.high]

    def _inside(self, values: Sequence[float]) -> list[float]:
        return [value for value in values if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)]
