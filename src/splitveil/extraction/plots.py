"""Curves of an extraction: error and worth of the clone over rows, for each noise; what noise costs, over noise."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from splitveil.extraction.rows import Row
from splitveil.report.numbers import NOT_MEASURED, percent, plain
from splitveil.report.svg import Plot, element, path

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 430.0, 290.0, 58.0, 26.0, 44.0, 330.0
LEAST = 1e-4
"""Errors below are drawn here: the exact core has no place on a logarithmic scale."""
ATTACKS = {
    "chosen": "Queries of the attacker's choice: columns, then the modular ladder. The core's peak is guessed.",
    "directed": "Chosen queries along the main directions of the public base model's activations.",
    "honest": "The client's own code on real text, and regression on its answers.",
    "trained-A": "The row space of the trained A is known: it was frozen or published, or another adapter shares it.",
    "initial-A": "A as PEFT drew it is known or guessed by its seed; training has moved it since. A prior, and chosen "
    "queries. To tell the right guess takes r + 16 rows more.",
    "span": "What the first answers tell of span(B), in any engine.",
    "published": "Lattice reduction on the published half alone.",
}
ENDS = {"base": "no adapter", "adapter": "true adapter"}
"""Controls, which ask for no rows."""


@dataclass(frozen=True)
class Line:
    """One attack's figures under one noise over rows, or a control's over noises."""

    name: str
    colour: int
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Scale:
    """Where a value is drawn, from 0 at the bottom to 1 at the top, and how it is written."""

    title: str
    ticks: Sequence[float]
    place: Callable[[float], float]
    written: Callable[[float], str]


def error_scale(title: str) -> Scale:
    """Of relative errors, from 0.01 % to 100 %, logarithmic."""

    def place(error: float) -> float:
        return 1 - math.log10(min(max(error, LEAST), 1.0)) / math.log10(LEAST)

    return Scale(title, [10.0**-power for power in range(5)], place, written_error)


def perplexity_scale(values: Sequence[float]) -> Scale:
    """Of perplexities, logarithmic, from the least of them to the greatest."""
    low, high = math.log(min(values)), math.log(max(values))
    if high - low < 0.1:
        low, high = low - 0.05, high + 0.05
    ticks = [math.exp(low + (high - low) * part / 4) for part in range(5)]
    return Scale("perplexity of held-out text", ticks, lambda value: (math.log(value) - low) / (high - low), plain)


def plots_of(rows: Sequence[Row]) -> list[Plot]:
    """For each noise the error of ΔW over rows, and where text judged, the error on it and the clone's perplexity;
    last, the true adapter's perplexity over noise.
    """
    found = []
    for number, noise in enumerate(sorted({row.noise for row in rows}), 1):
        here = [row for row in rows if row.noise == noise]
        under = f"answer noise {100 * noise:g} %"
        for metric, words in (("error", "Error of ΔW"), ("error on text", "Error on text")):
            if lines := _over_rows(here, metric):
                name = f"{metric.replace(' ', '-')}-{number}"
                found.append(_plot(name, f"{words}, {under}", lines, error_scale("relative error"), "rows"))
        if lines := _over_rows(here, "perplexity"):
            counts = [count for line in lines for count, _ in line.points]
            lines += _ends(here, (min(counts), max(counts)))
            scale = perplexity_scale([value for line in lines for _, value in line.points])
            found.append(_plot(f"worth-{number}", f"What the clone is worth, {under}", lines, scale, "rows"))
    costs = sorted((row.noise, row.value) for row in _measured(rows, "adapter", "perplexity"))
    if len(costs) > 1:
        line = Line(ENDS["adapter"], len(ATTACKS), costs)
        scale = perplexity_scale([value for _, value in costs])
        title = "What noise costs who uses the adapter"
        found.append(_plot("noise", title, [line], scale, "answer noise", lambda noise: f"{100 * noise:g} %"))
    return found


def _measured(rows: Iterable[Row], attack: str, metric: str) -> list[Row]:
    return [row for row in rows if (row.attack, row.metric) == (attack, metric) and not math.isnan(row.value)]


def _over_rows(rows: Sequence[Row], metric: str) -> list[Line]:
    lines = []
    for colour, attack in enumerate(ATTACKS):
        points = sorted((float(row.rows), row.value) for row in _measured(rows, attack, metric) if row.rows > 0)
        if points:
            lines.append(Line(attack, colour, points))
    return lines


def _ends(rows: Sequence[Row], between: tuple[float, float]) -> list[Line]:
    """Levels across the plot: without the adapter, and with the true one."""
    return [
        Line(words, len(ATTACKS) - 1 + index, [(count, row.value) for count in between])
        for index, (control, words) in enumerate(ENDS.items())
        for row in _measured(rows, control, "perplexity")[:1]
    ]


def _plot(
    name: str,
    title: str,
    lines: Sequence[Line],
    scale: Scale,
    across: str,
    written: Callable[[float], str] = lambda count: f"{count:g}",
) -> Plot:
    """``lines`` over counts of rows, on a logarithmic axis, or over noises, one beside the other."""
    counts = sorted({count for line in lines for count, _ in line.points})
    bottom, span = HEIGHT - BOTTOM, RIGHT - LEFT - 24
    if across == "rows":
        first, last = math.log(counts[0]), math.log(counts[-1])
        places = {c: 0.5 if first == last else (math.log(c) - first) / (last - first) for c in counts}
    else:
        places = {count: index / max(1, len(counts) - 1) for index, count in enumerate(counts)}

    def x(count: float) -> float:
        return LEFT + 10 + places[count] * span

    def y(value: float) -> float:
        return bottom - scale.place(value) * (bottom - TOP)

    parts = []
    for tick in scale.ticks:
        parts.append(element("line", x1=LEFT, x2=RIGHT, y1=y(tick), y2=y(tick), class_="grid"))
        words = scale.written(tick)
        parts.append(element("text", text=words, x=LEFT - 6, y=y(tick) + 4, text_anchor="end", class_="muted"))
    for count in _apart(counts, x):
        parts.append(element("line", x1=x(count), x2=x(count), y1=bottom, y2=bottom + 4, class_="axis"))
        label = written(count)
        parts.append(element("text", text=label, x=x(count), y=bottom + 17, text_anchor="middle", class_="muted"))
    parts.append(element("line", x1=LEFT, x2=RIGHT, y1=bottom, y2=bottom, class_="axis"))
    middle = (LEFT + RIGHT) / 2
    parts.append(element("text", text=across, x=middle, y=HEIGHT - 8, text_anchor="middle", class_="muted"))
    parts.append(element("text", text=scale.title, x=4.0, y=12.0, class_="muted"))
    ends = sorted(((y(line.points[-1][1]), line) for line in lines), key=lambda end: end[0])
    lowest = TOP
    # Names are pushed apart; those at the bottom may leave their line's end.
    wanted_at = [min(end, bottom - 14.0 * (len(ends) - 1 - index)) for index, (end, _) in enumerate(ends)]
    for (_, line), wanted in zip(ends, wanted_at, strict=True):
        lowest = max(lowest, wanted)
        drawn = path((x(count), y(value)) for count, value in line.points)
        parts.append(element("path", d=drawn, class_=f"line stroke{line.colour}"))
        for count, value in line.points:
            words = element("title", text=f"{line.name}, {written(count)} {across}: {scale.written(value)}")
            parts.append(element("circle", words, cx=x(count), cy=y(value), r=3.5, class_=f"mark fill{line.colour}"))
        parts.append(element("text", text=line.name, x=RIGHT + 8, y=lowest + 4, class_=f"fill{line.colour} name"))
        lowest += 14
    described = "; ".join(
        f"{line.name}: "
        + ", ".join(f"{scale.written(value)} at {written(count)} {across}" for count, value in line.points)
        for line in lines
    )
    return Plot(name, WIDTH, HEIGHT, title, described, "".join(parts))


def _apart(counts: Sequence[float], x: Callable[[float], float]) -> list[float]:
    """Counts whose labels do not touch, the first always."""
    kept: list[float] = []
    for count in counts:
        if not kept or x(count) - x(kept[-1]) > 34:
            kept.append(count)
    return kept


def written_error(error: float) -> str:
    """A relative error as a percentage."""
    if math.isnan(error):
        return NOT_MEASURED
    return percent(error) if error >= 0.001 else f"{100 * error:.2g} %"
