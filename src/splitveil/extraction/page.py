"""The report of an extraction: one HTML file in the look of the audit's, with plots for each noise and all figures."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from splitveil.extraction.plots import ATTACKS, ENDS, plots_of, written_error
from splitveil.extraction.rows import Row
from splitveil.report.numbers import NOT_MEASURED, plain, plain_range
from splitveil.report.svg import STYLE

SHOWN = ("error", "error on text", "exact", "span unknown", "perplexity")
CAPTIONS = {
    "error": "error of ΔW",
    "error on text": "error on text",
    "exact": "layers exact",
    "span unknown": "span(B) unknown",
    "perplexity": "perplexity",
}


def write_page(rows: Iterable[Row], folder: Path, command: str) -> Path:
    """Writes ``folder/report.html`` about ``rows`` and returns its path."""
    found = list(rows)
    names = sorted({row.adapter for row in found})
    title = f"Extraction: {', '.join(names)}"
    drawn = "".join(
        f"<figure>{plot.inline()}<figcaption>{escape(plot.title)}</figcaption></figure>" for plot in plots_of(found)
    )
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
<p>Over rows answered at every layer. A row is a token: a prompt of L tokens is L rows. These are the best attacks that
are known, not bounds. Where text was given, there is the error on activations of held-out text, too, and the perplexity
of that text with the clone: what it is worth to who made it. Errors below 0.01 % are drawn there.</p>
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
    value = plain(row.value) if metric == "perplexity" else written_error(row.value)
    between = plain_range(row.low, row.high) if metric == "perplexity" else ""
    return f'<td class="number">{value}{f"<small>{between}</small>" if between else ""}</td>'
