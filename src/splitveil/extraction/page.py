"""The report of an extraction: one HTML file in the look of the audit's, with a plot for each noise and all figures."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path

from splitveil.extraction.rows import Row
from splitveil.report.numbers import NOT_MEASURED, percent, plain, plain_range
from splitveil.report.svg import STYLE, Plot, element, path

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 430.0, 290.0, 52.0, 26.0, 44.0, 330.0
LEAST = 1e-4
"""Errors below are drawn here: the exact core has no place on a logarithmic scale."""
ENDS = ("base", "adapter")
SHOWN = ("error", "error on text", "exact", "span unknown", "perplexity")
CAPTIONS = {
    "error": "error of ΔW",
    "error on text": "error on text",
    "exact": "layers exact",
    "span unknown": "span(B) unknown",
    "perplexity": "perplexity",
}
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


@dataclass(frozen=True)
class Line:
    """One attack's errors under one noise, over rows."""

    name: str
    colour: int
    points: Sequence[tuple[int, float]]


def write_page(rows: Iterable[Row], folder: Path, command: str) -> Path:
    """Writes ``folder/report.html`` about ``rows`` and returns its path."""
    found = list(rows)
    names = sorted({row.adapter for row in found})
    title = f"Extraction: {', '.join(names)}"
    noises = sorted({row.noise for row in found})
    plots = [plot for number, noise in enumerate(noises, 1) if (plot := _plot(found, noise, f"error-{number}"))]
    drawn = "".join(f"<figure>{plot.inline()}<figcaption>{escape(plot.title)}</figcaption></figure>" for plot in plots)
    style = files("splitveil.report").joinpath("templates/style.css").read_text(encoding="utf-8") + STYLE
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    terms = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(words)}</dd>"
        for name, words in ATTACKS.items()
        if any(row.attack == name for row in found)
    )
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header class="masthead"><p class="product">Splitveil</p><h1>{escape(title)}</h1></header>
<main>
<section><h2>How much of the adapter a client rebuilds</h2>
<p>Relative error of the clone, over rows answered at every layer. A row is a token: a prompt of L tokens is L rows.
These are the best attacks that are known, not bounds. Where text was given, the error is that on activations of
held-out text. Errors below 0.01 % are drawn there.</p>
<div class="plots">{drawn}</div></section>
<section><h2>All figures</h2>
<p>Perplexity is of held-out text; base: without an adapter; adapter: the true one, through the protocol under that
noise. Intervals are of 95 %, over windows of text, or from the best to the worst layer.</p>
{_table(found)}</section>
<section><h2>Attacks</h2><dl class="terms">{terms}</dl></section>
<section><h2>Reproduce</h2><pre>{escape(command)}</pre></section>
</main>
<footer><p>One file, no network: nothing in this page is loaded from anywhere.</p></footer>
</body>
</html>
"""
    out = folder / "report.html"
    out.write_text(page, encoding="utf-8", errors="replace")
    return out


def _plot(rows: Sequence[Row], noise: float, name: str) -> Plot | None:
    lines = []
    for colour, attack in enumerate(ATTACKS):
        here = [row for row in rows if row.attack == attack and row.noise == noise and row.rows > 0]
        metric = "error on text" if any(row.metric == "error on text" for row in here) else "error"
        points = sorted((row.rows, row.value) for row in here if row.metric == metric and not math.isnan(row.value))
        if points:
            lines.append(Line(attack, colour, points))
    if not lines:
        return None
    counts = [count for line in lines for count, _ in line.points]
    first, last = math.log(min(counts)), math.log(max(counts))
    bottom = HEIGHT - BOTTOM

    def x(count: int) -> float:
        share = 0.5 if first == last else (math.log(count) - first) / (last - first)
        return LEFT + 10 + share * (RIGHT - LEFT - 24)

    def y(error: float) -> float:
        share = math.log10(min(max(error, LEAST), 1.0)) / math.log10(LEAST)
        return TOP + share * (bottom - TOP)

    parts = []
    for power in range(5):
        error = 10.0**-power
        parts.append(element("line", x1=LEFT, x2=RIGHT, y1=y(error), y2=y(error), class_="grid"))
        words = f"{100 * error:g} %"
        parts.append(element("text", text=words, x=LEFT - 6, y=y(error) + 4, text_anchor="end", class_="muted"))
    for count in _ticks(sorted(set(counts)), x):
        parts.append(element("line", x1=x(count), x2=x(count), y1=bottom, y2=bottom + 4, class_="axis"))
        parts.append(element("text", text=str(count), x=x(count), y=bottom + 17, text_anchor="middle", class_="muted"))
    parts.append(element("line", x1=LEFT, x2=RIGHT, y1=bottom, y2=bottom, class_="axis"))
    middle = (LEFT + RIGHT) / 2
    parts.append(element("text", text="rows", x=middle, y=HEIGHT - 8, text_anchor="middle", class_="muted"))
    parts.append(element("text", text="relative error", x=4.0, y=12.0, class_="muted"))
    ends = sorted(((y(line.points[-1][1]), line) for line in lines), key=lambda end: end[0])
    lowest = TOP
    # Names are pushed apart; those at the bottom may leave their line's end.
    places = [min(end, bottom - 14.0 * (len(ends) - 1 - index)) for index, (end, _) in enumerate(ends)]
    for (_, line), wanted in zip(ends, places, strict=True):
        lowest = max(lowest, wanted)
        drawn = path((x(count), y(error)) for count, error in line.points)
        parts.append(element("path", d=drawn, class_=f"line stroke{line.colour}"))
        for count, error in line.points:
            words = element("title", text=f"{line.name}, {count} rows: {_percent(error)}")
            parts.append(element("circle", words, cx=x(count), cy=y(error), r=3.5, class_=f"mark fill{line.colour}"))
        parts.append(element("text", text=line.name, x=RIGHT + 8, y=lowest + 4, class_=f"fill{line.colour} name"))
        lowest += 14
    described = "; ".join(
        f"{line.name}: " + ", ".join(f"{_percent(error)} after {count} rows" for count, error in line.points)
        for line in lines
    )
    return Plot(name, WIDTH, HEIGHT, f"Answer noise {100 * noise:g} %", described, "".join(parts))


def _ticks(counts: Sequence[int], x: Callable[[int], float]) -> list[int]:
    """Counts whose labels do not touch, the first always."""
    kept: list[int] = []
    for count in counts:
        if not kept or x(count) - x(kept[-1]) > 34:
            kept.append(count)
    return kept


def _percent(error: float) -> str:
    if math.isnan(error):
        return NOT_MEASURED
    return percent(error) if error >= 0.001 else f"{100 * error:.2g} %"


def _table(rows: Sequence[Row]) -> str:
    """One line for each measurement; modules are in rows.jsonl."""
    lines: dict[str, dict[str, Row]] = {}
    for row in rows:
        lines.setdefault(row.key, {})[row.metric] = row
    metrics = [metric for metric in SHOWN if any(metric in line for line in lines.values())]
    head = "".join(f"<th>{words}</th>" for words in ("noise", "attack", "rows"))
    head += "".join(f'<th class="number">{CAPTIONS[metric]}</th>' for metric in metrics)
    body = []
    for line in sorted(lines.values(), key=_order):
        row = next(iter(line.values()))
        cells = "".join(_cell(line.get(metric), metric) for metric in metrics)
        if row.error:
            cells = f'<td class="absent" colspan="{len(metrics)}">{escape(f"{NOT_MEASURED}: {row.error}")}</td>'
        lead = f"<td>{100 * row.noise:g} %</td><th scope=row>{escape(row.attack)}</th><td>{row.rows or ''}</td>"
        body.append(f"<tr{' class=control' if row.attack in ENDS else ''}>{lead}{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _order(line: dict[str, Row]) -> tuple[float, int, int]:
    row = next(iter(line.values()))
    names = (*ENDS, *ATTACKS)
    return row.noise, names.index(row.attack) if row.attack in names else len(names), row.rows


def _cell(row: Row | None, metric: str) -> str:
    if row is None:
        return "<td></td>"
    if math.isnan(row.value):
        return f'<td class="absent">{NOT_MEASURED}</td>'
    value = plain(row.value) if metric == "perplexity" else _percent(row.value)
    between = plain_range(row.low, row.high) if metric == "perplexity" else ""
    return f'<td class="number">{value}{f"<small>{between}</small>" if between else ""}</td>'
