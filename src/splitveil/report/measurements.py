"""The rows of an audit, checked and laid out so that the report can ask for one cell at a time."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from splitveil.errors import ConfigurationError

NONE = "none"
FLOOR = "floor"
ORACLE = "oracle"
INFORMATION = "information:"
SCORE = "token_accuracy"
TEXT = "-text"
"""Ends the name of an estimator that was asked about the whole text."""
INAPPLICABLE = "no value, and no error: it does not apply here"
FIELDS = {"model", "data", "cut", "attack", "defence", "defence_params", "seed"} | {
    *("metric", "value", "low", "high", "prompts", "seconds", "error")
}


@dataclass(frozen=True)
class Setting:
    """One model on one data set."""

    model: str
    data: str


@dataclass(frozen=True)
class Cell:
    """One figure. Where nothing was measured ``value`` is NaN and ``reason`` says why."""

    value: float
    low: float
    high: float
    prompts: int
    reason: str = ""
    seeds: int = 1
    seconds: float = math.nan

    @property
    def measured(self) -> bool:
        return not math.isnan(self.value)


ABSENT = Cell(math.nan, math.nan, math.nan, 0, "not part of this audit")


@dataclass(frozen=True)
class Row:
    """One line of ``rows.jsonl``; null has become NaN."""

    setting: Setting
    cut: int
    attack: str
    defence: str
    metric: str
    cell: Cell


def is_floor(attack: str) -> bool:
    """Whether an attack is a level of chance: "floor", or a kind of it such as "floor:constant"."""
    return attack == FLOOR or attack.startswith(FLOOR + ":")


def is_control(attack: str) -> bool:
    return is_floor(attack) or attack == ORACLE


class Measurements:
    """All rows of a report. Raises ``ConfigurationError`` for a row that lacks a field or holds the wrong type."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        raw = list(rows)
        for number, row in enumerate(raw, 1):
            missing = FIELDS - row.keys()
            if missing:
                raise ConfigurationError(f"row {number} of the report lacks {', '.join(sorted(missing))}")
        label = _labels(raw)
        self.rows = [_row(number, row, label) for number, row in enumerate(raw, 1)]
        self._cells: dict[tuple[Setting, int, str, str, str], list[Cell]] = {}
        for r in self.rows:
            self._cells.setdefault((r.setting, r.cut, r.attack, r.defence, r.metric), []).append(r.cell)
        self._tried = {
            (r.setting, r.cut, r.defence)
            for r in self.rows
            if not is_control(r.attack) and not r.attack.startswith(INFORMATION)
        }
        self.settings = list(dict.fromkeys(r.setting for r in self.rows))
        self.attacks = list(
            dict.fromkeys(
                r.attack for r in self.rows if not is_control(r.attack) and not r.attack.startswith(INFORMATION)
            )
        )
        """In order of appearance, without controls and estimators."""
        self.floors = list(dict.fromkeys(r.attack for r in self.rows if is_floor(r.attack)))
        self.estimators = list(dict.fromkeys(r.attack for r in self.rows if r.attack.startswith(INFORMATION)))
        found = list(dict.fromkeys(r.defence for r in self.rows))
        self.defences = sorted(found, key=lambda name: name != NONE)
        """``none`` first, then in order of appearance."""

    def cuts(self, setting: Setting) -> list[int]:
        """Cuts that attacks were tried at, from the first block on."""
        return sorted({r.cut for r in self.rows if r.setting == setting and not r.attack.startswith(INFORMATION)})

    def profile(self, setting: Setting, estimator: str) -> list[tuple[int, Cell, float]]:
        """(block, bits, the floor's bits) of one estimator on the plain crossing, by block."""
        blocks = sorted({r.cut for r in self.rows if r.setting == setting and r.attack == estimator})
        return [
            (block, bits, self.cell(setting, block, estimator, NONE, "bits_floor").value)
            for block in blocks
            if (bits := self.cell(setting, block, estimator, NONE, "bits")).measured
        ]

    def cell(self, setting: Setting, cut: int, attack: str, defence: str = NONE, metric: str = SCORE) -> Cell:
        """One figure. Over several seeds: the mean, and the widest interval. An attack that failed as a whole has an
        error row without a metric, which answers for all of them."""
        cells = self._cells.get((setting, cut, attack, defence, metric), [])
        cells = cells or self._cells.get((setting, cut, attack, defence, ""), [])
        good = [cell for cell in cells if cell.measured]
        if not good:
            return next(iter(cells), ABSENT)
        if len(good) == 1:
            return good[0]
        return Cell(
            value=sum(c.value for c in good) / len(good),
            low=min(c.low for c in good),
            high=max(c.high for c in good),
            prompts=good[0].prompts,
            seeds=len(good),
            seconds=sum(c.seconds for c in good),
        )

    def floor(self, setting: Setting, cut: int, defence: str = NONE, metric: str = SCORE) -> Cell:
        """The level of chance: the best that guessing without looking reaches. It does not depend on the crossing, so a
        floor of the undefended crossing stands in where the defended one has none."""
        for where in (defence, NONE):
            cells = [self.cell(setting, cut, name, where, metric) for name in self.floors]
            measured = [cell for cell in cells if cell.measured]
            if measured:
                return max(measured, key=lambda cell: cell.value)
        return Cell(math.nan, math.nan, math.nan, 0, "no floor was measured")

    def ranked(
        self, setting: Setting, cut: int, defence: str = NONE, metric: str = SCORE, among: Sequence[str] | None = None
    ) -> list[tuple[str, Cell]]:
        """Attacks that were measured, the best first."""
        names = self.attacks if among is None else among
        cells = [(name, self.cell(setting, cut, name, defence, metric)) for name in names]
        return sorted((pair for pair in cells if pair[1].measured), key=lambda pair: -pair[1].value)

    def tried(self, setting: Setting, cut: int, defence: str) -> bool:
        """Whether any attack has a row there, measured or failed."""
        return (setting, cut, defence) in self._tried

    def failures(self) -> list[Row]:
        """Rows with an error."""
        return [row for row in self.rows if not row.cell.measured and row.cell.reason != INAPPLICABLE]

    def inapplicable(self) -> dict[tuple[str, str], int]:
        """(data, metric) → rows that have neither a value nor an error."""
        found = [row for row in self.rows if row.cell.reason == INAPPLICABLE]
        return dict(Counter((row.setting.data, row.metric) for row in found))


def _row(number: int, row: Mapping[str, Any], label: Mapping[tuple[str, str], str]) -> Row:
    cut = row["cut"]
    if not isinstance(cut, int):
        raise ConfigurationError(f"row {number} of the report: cut is a whole number, got {cut!r}")
    values = [_number(number, name, row[name]) for name in ("value", "low", "high", "seconds")]
    value, low, high, seconds = values
    reason = "" if row["error"] is None else str(row["error"])
    if reason:  # a failed measurement has no value, whatever stands there
        value = low = high = math.nan
    elif math.isnan(value):
        reason = INAPPLICABLE
    return Row(
        Setting(str(row["model"]), str(row["data"])),
        cut,
        str(row["attack"]),
        label[_identity(row)],
        str(row["metric"] or ""),
        Cell(value, low, high, int(row["prompts"] or 0), reason, seconds=seconds),
    )


def _number(number: int, name: str, value: object) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigurationError(f"row {number} of the report: {name} is a number or null, got {value!r}")
    return float(value)


def _identity(row: Mapping[str, Any]) -> tuple[str, str]:
    params = row["defence_params"]
    return str(row["defence"]), params if isinstance(params, str) else json.dumps(params or {}, sort_keys=True)


def _labels(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], str]:
    """A defence is shown by its name, and by its parameters too where it has any that a reader must know.

    "gaussian" with {"sigma": 0.1} is "gaussian:0.1", as the command line writes it; a name with parameters that never
    differ ("int8") stands alone.
    """
    kinds = dict.fromkeys(_identity(row) for row in rows)
    labels = {}
    for name, text in kinds:
        params = json.loads(text) if text.startswith("{") else {"": text}
        alone = sum(other == name for other, _ in kinds) == 1
        numbers = ", ".join(str(value) for value in params.values())
        continuous = any(isinstance(value, float) for value in params.values())
        labels[name, text] = name if ":" in name or not numbers or (alone and not continuous) else f"{name}:{numbers}"
    return labels
