"""What an audit found: its rows, whether they can be trusted, and the report."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitveil.auditing.metrics import METRICS
from splitveil.auditing.rows import INFORMATION, Row
from splitveil.report import write_report

FLOOR, ORACLE = "floor", "oracle"


@dataclass(frozen=True)
class Report:
    """The rows of one model, one data set and one shadow text, whichever runs measured them."""

    rows: tuple[Row, ...]
    texts: tuple[Mapping[str, Any], ...]
    """Some prompts with what each attack recovered."""
    meta: Mapping[str, Any]
    """What the report says about the run: model, data, shadow text, versions, why it is invalid if it is."""
    folder: Path | None
    """Where the rows are kept; None where they were not to be."""

    @property
    def valid(self) -> bool:
        """Whether the control that must reach 1.0 did, wherever something was measured."""
        return not self.meta["invalid"]

    @property
    def scores(self) -> tuple[Row, ...]:
        """The attack scores, one row for each cut, defence and attack: token accuracy, or NaN and the error."""
        return tuple(scores(self.rows))

    def summary(self) -> dict[str, Any]:
        """For JSON: the attack scores, what failed, whether the report is valid, and where things are."""
        shown = ("cut", "defence", "attack", "value", "low", "high", "prompts", "seconds", "error")
        found: dict[str, Any] = {
            "model": self.meta["model"],
            "data": dict(self.meta["data"]),
            "shadow": self.meta["shadow"],
            "valid": self.valid,
            "invalid": list(self.meta["invalid"]),
            "scores": [{name: row.as_dict()[name] for name in shown} for row in self.scores],
            "failed": sum(row.error is not None for row in self.scores),
            "correlation": list(self.meta["correlation"]),
        }
        if self.folder is not None:
            found |= {"rows": str(self.folder / "rows.jsonl"), "report": str(self.folder / "report.html")}
        return found

    def to_html(self, folder: str | Path) -> Path:
        """Writes ``report.html``, which needs nothing else, and ``plots/`` into ``folder``; returns the page's path.

        The page contains prompts, and what was recovered of them.
        """
        rows, texts = [row.as_dict() for row in self.rows], [dict(text) for text in self.texts]
        return write_report(rows, texts, self.meta, Path(folder))


def scores(rows: Sequence[Row]) -> Iterator[Row]:
    """Rows of the attack score among ``rows``."""
    return (row for row in rows if row.metric == METRICS[-1] and not row.attack.startswith(INFORMATION))


def is_control(attack: str) -> bool:
    """Whether an attack is there to check the audit and not the model: ``oracle``, ``floor`` and kinds of it."""
    return attack == ORACLE or attack.partition(":")[0] == FLOOR


def invalid_reasons(rows: Sequence[Row]) -> list[str]:
    """Why a report with these rows cannot be trusted: the control that must reach 1.0 did not, or was not measured."""
    reached: dict[tuple[int, str], dict[str, float]] = {(row.cut, row.defence): {} for row in scores(rows)}
    for row in rows:
        if row.attack == ORACLE and row.metric in {"token_accuracy", "exact_match"}:
            reached[row.cut, row.defence][row.metric] = row.value
    reasons = []
    for (cut, defence), values in reached.items():
        if values != {"token_accuracy": 1.0, "exact_match": 1.0}:
            got = values.get("token_accuracy", math.nan)
            said = "was not measured" if math.isnan(got) else f"reached {got:.3f}, expected 1.0"
            reasons.append(f"cut {cut}, defence {defence}: the control {ORACLE!r} {said}")
    return reasons
