"""Puts a report together: one HTML file that loads nothing, and its plots as files."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from operator import itemgetter
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from splitveil.errors import ConfigurationError
from splitveil.report import tables
from splitveil.report.by_defence import by_defence
from splitveil.report.controls import broken, controls
from splitveil.report.findings import findings
from splitveil.report.frontier import Panel, marks, panels
from splitveil.report.learning import lines, still_rising
from splitveil.report.lines import estimator_words, information, recovery
from splitveil.report.literature import REFERENCES
from splitveil.report.measurements import NONE, Measurements, Setting
from splitveil.report.meta import Meta
from splitveil.report.numbers import NOT_MEASURED, counted, plain, plain_range
from splitveil.report.svg import STYLE, Plot
from splitveil.report.texts import Example, examples, visible
from splitveil.report.verdict import block, verdict

OPEN_TEXTS = 3
"""Texts a data set shows at once; the others are folded."""
# Should escaping ever fail, the browser still runs no script, and nothing is fetched.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Frontier:
    """What is recovered against what is paid at one cut, and what follows from it."""

    cut: int
    panels: list[Panel]
    findings: list[str]


@dataclass(frozen=True)
class Chapter:
    """Everything about one model on one data set."""

    label: str
    setting: Setting
    note: str
    prompts: str
    cuts: list[int]
    lines: list[tables.Line]
    plots: list[Plot]
    by_defence: Plot | None
    frontiers: list[Frontier]
    defences: dict[str, list[tables.Defended]]
    metrics: dict[str, str]
    everything: list[tables.Place]
    examples: list[Example]


def write_report(
    rows: Iterable[Mapping[str, Any]], texts: Iterable[Mapping[str, Any]], meta: Mapping[str, Any], out: Path
) -> Path:
    """Writes ``out/report.html`` and ``out/plots/*.svg``; returns the path of the page.

    ``rows`` are the objects of ``rows.jsonl``; a null value is shown as not measured, with its error. Recovery figures
    are shares from 0 to 1. ``texts`` are as in ``texts.examples``, ``meta`` as in ``Meta``. Raises
    ``ConfigurationError`` for a row or a text that is not as described, or for a text without a row.
    """
    m, about, shown = Measurements(rows), Meta.of(meta), examples(texts)
    strange = {e.data for e in shown} - {s.data for s in m.settings}
    if strange:
        raise ConfigurationError(f"texts of {', '.join(sorted(strange))} were given, but no row of that data set")
    invalid = [*about.invalid, *broken(m)]
    chapters = _chapters(m, about, shown, invalid)
    costs = tables.metrics_present(m, tables.COSTS)
    page = (
        _environment()
        .get_template("audit.html.j2")
        .render(
            about=about,
            m=m,
            policy=POLICY,
            invalid=invalid,
            verdict=verdict(m, about, invalid),
            controls=controls(m),
            chapters=chapters,
            costs=tables.costs(m, costs) if costs else [],
            cost_titles=costs,
            learnt=lines(about.learning),
            still_rising=still_rising(about.learning),
            failures=m.failures(),
            inapplicable=m.inapplicable(),
            references=REFERENCES,
            open_texts=OPEN_TEXTS,
            not_measured=NOT_MEASURED,
            protected=[name for name in m.defences if name != NONE],
        )
    )
    out.mkdir(parents=True, exist_ok=True)
    drawings = out / "plots"
    drawings.mkdir(exist_ok=True)
    for chapter in chapters:
        frontiers = [panel.plot for frontier in chapter.frontiers for panel in frontier.panels]
        for plot in [*chapter.plots, *([chapter.by_defence] if chapter.by_defence else []), *frontiers]:
            (drawings / f"{plot.name}.svg").write_text(plot.file(), encoding="utf-8", errors="replace")
    path = out / "report.html"
    path.write_text(page, encoding="utf-8", errors="replace")  # a lone surrogate has no encoding
    return path


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("splitveil.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = files("splitveil.report").joinpath("templates/style.css").read_text(encoding="utf-8")
    environment.globals.update(style=Markup(style + STYLE), block=block, plain=plain, plain_range=plain_range)  # noqa: S704
    environment.filters.update(
        svg=lambda plot: Markup(plot.inline()),  # noqa: S704 - every element was escaped when it was made
        visible=visible,
        counted=counted,
        summary=tables.summary_of,
        estimator=estimator_words,
    )
    return environment


def _chapters(m: Measurements, about: Meta, shown: list[Example], invalid: list[str]) -> list[Chapter]:
    several = len({s.model for s in m.settings}) > 1
    out = []
    for number, setting in enumerate(m.settings, 1):
        blocks = {row.cut for row in m.rows if row.setting == setting}
        span = (min(blocks), max(blocks))
        metrics = tables.metrics_present(m, tables.METRICS, setting)
        plots = [
            recovery(m, setting, f"recovery-{number}", span),
            information(m, setting, f"information-{number}", span),
            information(m, setting, f"information-text-{number}", span, text=True),
        ]
        out.append(
            Chapter(
                label=f"{setting.data} · {setting.model}" if several else setting.data,
                setting=setting,
                note=about.data.get(setting.data, ""),
                prompts=tables.prompts_range(m, setting),
                cuts=m.cuts(setting),
                lines=tables.by_cut(m, about, setting),
                plots=[plot for plot in plots if plot],
                by_defence=by_defence(m, setting, f"defences-{number}"),
                frontiers=_frontiers(m, about, setting, f"frontier-{number}", invalid),
                defences=tables.defences(m, about, setting),
                metrics=metrics,
                everything=tables.everything(m, setting, metrics),
                examples=_chosen(m, setting, [e for e in shown if e.data == setting.data]),
            )
        )
    return out


def _frontiers(m: Measurements, about: Meta, setting: Setting, name: str, invalid: list[str]) -> list[Frontier]:
    """Of each cut where two defences or more, or one and none, can be compared; the deepest first."""
    out = []
    for cut in reversed(m.cuts(setting)):
        found = marks(m, about.prices, setting, cut)
        if len(found) > 1:
            drawn = panels(found, m.floor(setting, cut), setting, cut, f"{name}-cut{cut}")
            out.append(Frontier(cut, drawn, findings(found, invalid)))
    return out


def _chosen(m: Measurements, setting: Setting, shown: list[Example]) -> list[Example]:
    """In turn from each cut, those with personal data first; of defended crossings only what the best attack made."""
    seen: Counter[int] = Counter()
    ranked = []
    for example in sorted(shown, key=lambda e: not any(run.kind == "personal" for run in e.original)):
        best = {d: next((name for name, _ in m.ranked(setting, example.cut, d)), "") for d in m.defences}
        kept = [r for r in example.recovered if r.defence == NONE or best.get(r.defence, r.attack) == r.attack]
        ranked.append((seen[example.cut], example.cut, replace(example, recovered=kept)))
        seen[example.cut] += 1
    return [example for _, _, example in sorted(ranked, key=itemgetter(0, 1))]
