"""The information profile in an audit: its rows, what is refused, resuming, and the rank correlation."""

import math
from pathlib import Path
from typing import Any

import pytest
from auditing_support import SHADOW, create_attack, create_defence, tiny_model, tiny_tokenizer

from splitveil.auditing import information
from splitveil.auditing.audit import audit
from splitveil.auditing.grid import Step
from splitveil.auditing.information import correlation
from splitveil.auditing.outcome import Report
from splitveil.auditing.rows import Row
from splitveil.errors import NonFiniteError

MODEL, TOKENIZER = tiny_model(), tiny_tokenizer()
TEXTS = [
    f"{a} is about {b}, {a}" for a in ("one", "two", "six", "ten", "many") for b in ("cats", "dogs", "trees", "rain")
]


def run(out: Path, **more: Any) -> Report:
    return audit(
        MODEL, TOKENIZER, TEXTS, SHADOW, (0,), ("fake",), out=out, tokens=16, windows=20, information=True,
        create_attack=create_attack, create_defence=create_defence, **more,
    )  # fmt: skip


def test_every_block_has_rows_and_they_are_kept(tmp_path: Path) -> None:
    report = run(tmp_path)
    bits = [row for row in report.rows if row.metric == "bits"]
    assert {row.cut for row in bits} == {0, 1, 2}
    usable = {row.cut: row for row in bits if row.attack == "information:usable"}
    floor = {row.cut: row for row in report.rows if (row.attack, row.metric) == ("information:usable", "bits_floor")}
    for cut in (0, 1, 2):
        assert usable[cut].low <= usable[cut].value <= usable[cut].high
        assert usable[cut].value > 2
        assert abs(floor[cut].value) < 0.2
    (refused,) = [row for row in bits if row.attack == "information:infonce-text" and row.cut == 0]
    assert math.isnan(refused.value)
    assert str(refused.error).startswith("refused: 20 pairs")
    assert report.valid
    assert report.summary()["failed"] == 0, "a refusal is a result"
    assert {entry["estimator"] for entry in report.meta["correlation"]} == {row.attack for row in bits}
    assert all("needs at least" in entry["reason"] for entry in report.meta["correlation"])

    content = (tmp_path / "rows.jsonl").read_bytes()
    steps: list[Step] = []
    assert run(tmp_path, watch=steps.append).rows == report.rows
    assert not steps
    assert (tmp_path / "rows.jsonl").read_bytes() == content


def test_a_failure_is_an_error_row_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise NonFiniteError("NaN somewhere")

    with monkeypatch.context() as patch:
        patch.setattr(information, "profile", failing)
        report = run(tmp_path)
    rows = [row for row in report.rows if row.attack.startswith("information:")]
    assert len(rows) == 3 * 5
    assert {row.error for row in rows} == {"NonFiniteError: NaN somewhere"}
    assert all(math.isnan(row.value) for row in rows)
    again = [row for row in run(tmp_path).rows if row.attack == "information:usable"]
    assert all(row.error is None for row in again)


def row(cut: int, attack: str, value: float, defence: str = "none") -> Row:
    return Row("", "m", "d", cut, attack, defence, {}, 0, "token_accuracy", value, value, value, 9, 1.0)


def test_correlation_is_over_cuts_with_the_mean_of_attacks_measured_everywhere() -> None:
    cuts = range(6)
    bits = [row(cut, "information:a", 9.0 - cut) for cut in cuts] + [
        row(cut, "information:b", math.nan) for cut in cuts
    ]
    attacks = [row(cut, "good", 1.0) for cut in cuts]
    attacks += [row(cut, "falling", 0.9 - cut / 10) for cut in cuts]
    attacks += [row(cut, "sometimes", float(cut)) for cut in (4, 5)]  # would turn the order around
    attacks += [row(cut, "floor", float(cut)) for cut in cuts] + [
        row(cut, "floor:constant", float(cut)) for cut in cuts
    ]
    attacks += [row(cut, "falling", float(cut), "int8") for cut in cuts]
    a, b = correlation(bits, attacks)
    assert a["estimator"] == "information:a"
    assert (a["rho"], a["points"], a["reason"]) == (pytest.approx(1.0), 6, "")
    assert b["rho"] is None
    assert b["reason"]
    assert correlation(bits, [])[0]["rho"] is None
