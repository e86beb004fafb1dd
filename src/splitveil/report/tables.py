"""The report's tables, as strings that a template only has to lay out."""

import math
from dataclasses import dataclass

from splitveil.report.measurements import ABSENT, INAPPLICABLE, NONE, ORACLE, SCORE, Cell, Measurements, Setting
from splitveil.report.meta import Meta
from splitveil.report.numbers import NOT_MEASURED, percent, percent_range, plain, plain_range
from splitveil.report.prices import Words, priced
from splitveil.report.standing import defended

SHARES = ("token_accuracy", "exact_match", "personal_recall", "personal_characters", "certified")
METRICS = {
    "token_accuracy": "Tokens",
    "rouge_l": "ROUGE-L F",
    "bleu": "BLEU",
    "exact_match": "Exact match",
    "cosine": "Cosine of mean embeddings",
    "personal_recall": "Personal data",
    "personal_characters": "… its characters",
}
COSTS = {
    "evaluations_median": "Median",
    "evaluations_mean": "Mean",
    "evaluations_p99": "99th percentile",
    "certified": "Certified",
}


@dataclass(frozen=True)
class Figure:
    """A table cell: a figure with its interval, or why there is none."""

    value: str
    interval: str = ""
    heat: float = 0.0
    """0 to 1: how strongly the cell is tinted."""
    best: bool = False
    reason: str = ""

    @property
    def measured(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Line:
    """A table row."""

    head: str
    note: str
    figures: list[Figure]
    control: bool = False


def figure(cell: Cell, metric: str, *, best: bool = False) -> Figure:
    """``cell`` in the words of its metric."""
    if not cell.measured:
        return Figure(NOT_MEASURED, reason=cell.reason)
    if metric in SHARES:
        return Figure(percent(cell.value), percent_range(cell.low, cell.high), min(max(cell.value, 0.0), 1.0), best)
    return Figure(plain(cell.value), plain_range(cell.low, cell.high), 0.0, best)


def by_cut(m: Measurements, meta: Meta, setting: Setting, defence: str = NONE) -> list[Line]:
    """Token accuracy, attack × cut; the best of each cut is marked, the controls come last."""
    cuts = m.cuts(setting)
    best = {cut: ranked[0][1].value for cut in cuts if (ranked := m.ranked(setting, cut, defence))}
    lines = []
    for attack in m.attacks:
        cells = [m.cell(setting, cut, attack, defence) for cut in cuts]
        figures = [
            figure(c, "token_accuracy", best=c.measured and c.value == best.get(cut))
            for cut, c in zip(cuts, cells, strict=True)
        ]
        needs = meta.attacks[attack].needs if attack in meta.attacks else ()
        highest = max((c.value for c in cells if c.measured), default=-1.0)
        lines.append((highest, Line(attack, ", ".join(needs), figures)))
    lines.sort(key=lambda pair: -pair[0])
    controls = [
        Line(
            name,
            "control: " + ("the true tokens" if name == ORACLE else "guessing without looking"),
            [figure(m.cell(setting, cut, name, defence), "token_accuracy") for cut in cuts],
            control=True,
        )
        for name in (*m.floors, ORACLE)
    ]
    return [line for _, line in lines] + controls


def metrics_present(m: Measurements, wanted: dict[str, str], setting: Setting | None = None) -> dict[str, str]:
    """Those of ``wanted`` that any row, or any of one setting, has a value or an error for; with their titles."""
    found = {r.metric for r in m.rows if setting in {None, r.setting} and r.cell.reason != INAPPLICABLE}
    return {metric: title for metric, title in wanted.items() if metric in found}


@dataclass(frozen=True)
class Place:
    """A row of the long table: one attack on one defended crossing."""

    cut: int
    defence: str
    attack: str
    prompts: int
    figures: list[Figure]


def everything(m: Measurements, setting: Setting, metrics: dict[str, str]) -> list[Place]:
    """Every attack that was tried, with every metric."""
    out = []
    for cut in m.cuts(setting):
        for defence in m.defences:
            for attack in (*m.attacks, *m.floors, ORACLE):
                cells = {metric: m.cell(setting, cut, attack, defence, metric) for metric in metrics}
                if all(c is ABSENT for c in cells.values()):
                    continue
                prompts = max(c.prompts for c in cells.values())
                out.append(Place(cut, defence, attack, prompts, [figure(c, k) for k, c in cells.items()]))
    return out


def costs(m: Measurements, metrics: dict[str, str]) -> list[tuple[Setting, Place]]:
    """What exact search had to spend for a token, where it reports it."""
    out = []
    for setting in m.settings:
        for cut in m.cuts(setting):
            for defence in m.defences:
                for attack in m.attacks:
                    cells = {metric: m.cell(setting, cut, attack, defence, metric) for metric in metrics}
                    if any(c.measured for c in cells.values()):
                        prompts = max(c.prompts for c in cells.values())
                        figures = [figure(c, k) for k, c in cells.items()]
                        out.append((setting, Place(cut, defence, attack, prompts, figures)))
    return out


@dataclass(frozen=True)
class Defended:
    """A row of the defences' table."""

    cut: int
    attack: str
    best: Figure
    plain: Figure
    """The same attack on the unprotected crossing."""
    personal: Figure | None
    """By the attack that recovers most of it; None where the texts mark no personal data."""
    standing: str
    reason: str
    price: Words


def defences(m: Measurements, meta: Meta, setting: Setting) -> dict[str, list[Defended]]:
    """Defence → by cut, the best adapted attack, beside the same attack on the unprotected crossing."""
    marked = "personal_recall" in metrics_present(m, METRICS, setting)
    nobody = Cell(math.nan, math.nan, math.nan, 0, "no attack has a result here; see what was not measured")
    out: dict[str, list[Defended]] = {}
    for defence in m.defences:
        for cut in m.cuts(setting):
            if defence == NONE or not m.tried(setting, cut, defence):
                continue
            attack, cell = next(iter(m.ranked(setting, cut, defence)), ("", nobody))
            _, personal = next(iter(m.ranked(setting, cut, defence, "personal_recall")), ("", nobody))
            judged = defended(m, setting, cut, defence)
            row = Defended(
                cut,
                attack,
                figure(cell, "token_accuracy"),
                figure(m.cell(setting, cut, attack) if attack else nobody, "token_accuracy"),
                figure(personal, "personal_recall") if marked else None,
                judged.standing.value,
                judged.reason,
                priced(meta.prices, defence, setting, cut),
            )
            out.setdefault(defence, []).append(row)
    return out


def summary_of(defence: str, meta: Meta) -> str:
    """What a defence is, whether it is listed with its parameters or without."""
    return meta.defences.get(defence) or meta.defences.get(defence.partition(":")[0], "")


def prompts_range(m: Measurements, setting: Setting) -> str:
    """ "64 prompts", "48 to 64 prompts": behind the figures of token accuracy in a setting."""
    counts = [
        row.cell.prompts for row in m.rows if row.setting == setting and row.metric == SCORE and row.cell.measured
    ]
    if not counts:
        return "no prompts"
    low, high = min(counts), max(counts)
    return f"{high} prompt{'s' if high != 1 else ''}" if low == high else f"{low} to {high} prompts"
