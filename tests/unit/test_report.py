"""The report: what it concludes from rows, what it shows of them, and that nothing in them can act in the page."""

import itertools
import json
import math
import random
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import report_example as example

from splitveil.attacks.control import Ceiling, Floor
from splitveil.attacks.knowledge import Access
from splitveil.defences.encrypted import EncryptedQuery
from splitveil.defences.none import Plain
from splitveil.errors import ConfigurationError
from splitveil.report import write_report
from splitveil.report.frontier import KINDS
from splitveil.report.lines import nice
from splitveil.report.measurements import FLOOR, NONE, ORACLE, Cell, Measurements, Setting
from splitveil.report.meta import Meta
from splitveil.report.numbers import in_prose, percent, percent_range, plain
from splitveil.report.standing import Standing, against_floor, defended
from splitveil.report.texts import examples
from splitveil.report.verdict import TIERS, Verdict, verdict

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Elements with their attributes, and the visible text; complains about elements that are left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.stack: list[str] = []
        self.feed(text)
        assert not self.stack, f"left open: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.stack:
            self.pieces.append(data)

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.pieces))


def page(
    tmp_path: Path,
    rows: list[dict[str, Any]] | None = None,
    texts: list[dict[str, Any]] | None = None,
    **meta: Any,
) -> Page:
    """The example, or a variant of it, written and read back."""
    rows = example.rows() if rows is None else rows
    texts = example.texts() if texts is None else texts
    return Page(write_report(rows, texts, example.meta(**meta), tmp_path).read_text())


def judged(rows: list[dict[str, Any]], **meta: Any) -> Verdict:
    return verdict(Measurements(rows), Meta.of(example.meta(**meta)), [])


def answer(found: Verdict, question: str) -> str:
    return " ".join(next(a.sentences for a in found.answers if a.question == question))


# The first screen.


def test_the_verdict_says_what_where_to_whom_and_what_to_do() -> None:
    found = judged(example.rows())
    assert found.level == "leak"
    assert found.headline == "Whoever receives what crosses can read the text, at every cut."
    assert found.lead == (
        "After block 1, 100\u202f% of the tokens of doctor-patient talk are recovered by anyone with the device half’s "
        "weights (search). Send the encrypted query instead: with it, every attack that works without is at the floor, "
        "no better than guessing."
    )
    assert "marked personal data" in answer(found, "What leaks")
    assert "After block 6, the last: 99.9\u202f% (search)." in answer(found, "Where")
    assert "Cutting deeper does not close the leak." in answer(found, "Where")
    assert "87 to 99.1\u202f% (revert)" in answer(found, "To whom")
    assert "everyone, if the base model is public" in answer(found, "To whom")
    assert answer(found, "What to do").startswith("Send the encrypted query instead")
    assert "int8 is no protection: 99.0\u202f% are still recovered." in answer(found, "What to do")


def test_a_defence_that_cannot_be_judged_is_neither_praised_nor_blamed() -> None:
    rows = [r for r in example.rows() if r["defence"] in {"none", "encrypted"}]
    for r in rows:
        if (r["attack"], r["defence"]) == ("search", "encrypted"):
            r.update(value=None, low=None, high=None, error="out of time")
    found = judged(rows)
    assert "floor" not in found.lead
    assert "whether that is the floor cannot be told" in answer(found, "What to do")


def test_a_defence_that_was_not_tried_is_not_praised() -> None:
    found = judged([r for r in example.rows() if r["defence"] in {"none", "int8"}])
    assert found.lead.endswith("(search). Do not send this crossing to anyone who must not read the text.")
    assert answer(found, "What to do").startswith("Do not send this crossing")
    assert "not measured here" in answer(found, "What to do")


def test_failing_attacks_are_no_proof_of_safety() -> None:
    rows = [r | {"value": example.FLOOR, "low": 0.029, "high": 0.033} for r in scored(example.rows())]
    found = judged(rows)
    assert found.level == "quiet"
    assert "no proof" in answer(found, "What to do")


def test_weak_leaks_are_called_weak() -> None:
    def only(value: float) -> Verdict:
        rows = [r for r in example.rows() if r["attack"] in {"mlp", "floor", "oracle"} and r["defence"] == "none"]
        return judged([r | change(value) if r["attack"] == "mlp" else r for r in rows])

    def change(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.005, "high": value + 0.005}

    assert (only(0.06).level, only(0.06).headline) == ("some", "What crosses gives away a little of the text.")
    assert only(0.3).headline.endswith("part of the text.")
    assert only(0.7).headline.endswith("most of the text.")
    assert only(0.95).level == "leak"


def test_without_results_nothing_is_concluded() -> None:
    assert judged([]).level == "void"
    failed = [r | {"value": None, "low": None, "high": None, "error": "no memory"} for r in example.rows()]
    assert judged(failed).headline == "Nothing was measured."


def scored(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of undefended attacks that have a value, and the controls."""
    return [r for r in rows if r["metric"] == "token_accuracy" and r["error"] is None and r["attack"] != "oracle"]


def test_words_are_those_of_attacks_and_defences() -> None:
    assert {need for need, _ in TIERS if need} == {Access.WEIGHTS, Access.QUERIES, Access.HEAD}
    assert EncryptedQuery.name == "encrypted"
    assert Plain.name == NONE
    assert {Floor.name, Ceiling.name} == {FLOOR, ORACLE}


# The controls.


def test_controls_stand_at_the_top_and_pass(tmp_path: Path) -> None:
    words = page(tmp_path).words
    assert words.index("truth scores 100") < words.index("Whoever receives")
    assert "floor 3.1" in words
    assert "attacks above the floor: 8 of 8" in words
    assert "INVALID" not in words


def test_a_truth_that_does_not_score_full_marks_invalidates_everything(tmp_path: Path) -> None:
    rows = example.rows()
    next(r for r in rows if r["attack"] == "oracle")["value"] = 0.98
    words = page(tmp_path, rows).words
    assert words.index("INVALID") < words.index("What is recovered")
    assert "scored 98.0 % instead of 100 %" in words
    assert "Whoever receives" not in words
    assert "FAIL" in words


def test_reasons_from_the_audit_invalidate_too(tmp_path: Path) -> None:
    words = page(tmp_path, invalid=["shadow text overlaps the victims"]).words
    assert "INVALID" in words
    assert "shadow text overlaps the victims" in words
    assert "Nothing can be concluded" in words


def test_missing_controls_are_missing_and_do_not_pass(tmp_path: Path) -> None:
    rows = [r for r in example.rows() if r["attack"] not in {"floor", "oracle"}]
    words = page(tmp_path, rows).words
    assert "truth not scored" in words
    assert "no floor" in words
    assert "at the floor: no better" not in words  # without a floor nothing is at it


# Where a figure stands.


def cell(value: float, half: float = 0.004) -> Cell:
    return Cell(value, value - half, value + half, 64)


@pytest.mark.parametrize(
    ("figure", "standing"),
    [
        (cell(0.030), Standing.FLOOR),
        (cell(0.033), Standing.FLOOR),
        (cell(0.0), Standing.FLOOR),
        (cell(0.036), Standing.UNKNOWN),  # the intervals meet, but the floor is outside this one
        (cell(0.05), Standing.ABOVE),
        (cell(0.03, half=0.03), Standing.UNKNOWN),  # too few prompts
        (Cell(0.03, math.nan, math.nan, 64), Standing.UNKNOWN),
        (Cell(math.nan, math.nan, math.nan, 0, "no memory"), Standing.UNKNOWN),
    ],
)
def test_standing_against_the_floor(figure: Cell, standing: Standing) -> None:
    assert against_floor(figure, cell(0.031)).standing is standing


HERE = Setting(example.MODEL, "personal data")


def test_a_defence_counts_only_attacks_that_succeed_without_it() -> None:
    rows = example.rows()
    found = defended(Measurements(rows), HERE, 1, "encrypted")
    assert found.standing is Standing.FLOOR
    assert "lens" not in found.reason  # at the floor on the plain crossing as well
    assert "search" in found.reason
    assert defended(Measurements(rows), HERE, 1, "gaussian:0.1").standing is Standing.ABOVE
    weak = [r for r in rows if r["attack"] in {"lens", "floor"}]
    assert defended(Measurements(weak), HERE, 1, "encrypted").standing is Standing.UNKNOWN


@pytest.mark.parametrize(("prompts", "standing"), [(2, Standing.UNKNOWN), (29, Standing.UNKNOWN), (30, Standing.FLOOR)])
def test_two_prompts_of_which_nothing_came_back_prove_nothing(prompts: int, standing: Standing) -> None:
    """Their bootstrap interval is 0 to 0."""
    assert against_floor(Cell(0.0, 0.0, 0.0, prompts), Cell(0.0, 0.0, 0.0, prompts)).standing is standing


def test_an_attack_that_failed_under_a_defence_is_not_at_the_floor() -> None:
    rows = example.rows()
    for r in rows:
        if (r["attack"], r["defence"]) == ("search", "encrypted"):
            r.update(value=None, low=None, high=None, error="out of time")
    found = defended(Measurements(rows), HERE, 1, "encrypted")
    assert (found.standing, found.reason) == (Standing.UNKNOWN, "search: out of time")


def test_the_highest_floor_counts() -> None:
    rows = example.rows()
    rows += [r | {"attack": "floor:constant", "value": 0.05, "low": 0.046, "high": 0.054} for r in rows if is_floor(r)]
    m = Measurements(rows)
    assert m.floor(HERE, 1).value == 0.05
    assert "floor:constant" not in m.attacks


def is_floor(row: dict[str, Any]) -> bool:
    return bool(row["attack"] == "floor")


# Rows.


def test_null_and_nan_are_not_measured_and_never_zero(tmp_path: Path) -> None:
    rows = example.rows()
    for r in rows:
        if (r["attack"], r["cut"], r["defence"]) == ("mlp", 3, "none"):
            r.update(value=None if r["metric"] == "bleu" else math.nan, low=None, high=None)
    found = page(tmp_path, rows)
    assert "it does not apply here" in found.words
    assert "no convergence in 540 s" in found.words
    assert not re.search(r"\bnan\b", found.words, re.IGNORECASE)
    line = next(line for line in found.words.split("queries to the device half, shadow text") if "not measured" in line)
    assert "0 %" not in line.split("not measured")[0]
    m = Measurements(rows)
    assert math.isnan(m.cell(HERE, 3, "mlp").value)
    assert "mlp" not in [name for name, _ in m.ranked(HERE, 3)]


def test_metrics_that_do_not_apply_are_no_failures_and_have_no_column(tmp_path: Path) -> None:
    m = Measurements(example.rows())
    assert {row.attack for row in m.failures()} == {"optimise", "nearest"}
    assert {key: count > 0 for key, count in m.inapplicable().items()} == {
        ("doctor-patient talk", "personal_recall"): True
    }
    words = page(tmp_path).words
    assert "these texts mark no personal data" in words
    heads = [part.split("Perplexity")[0] for part in words.split("Best attack Tokens Verdict Unprotected")[1:]]
    assert [head.strip().startswith("Personal data") for head in heads] == [False, True]


def test_an_error_row_has_no_value_whatever_it_holds() -> None:
    where = {"data": "d", "cut": 1, "defence": "none", "defence_params": {}}
    m = Measurements([example.row(where, "mlp", "token_accuracy", 0.0, 0.0, 0.0, 3, error="killed")])
    assert m.cell(Setting(example.MODEL, "d"), 1, "mlp").reason == "killed"
    assert not m.cell(Setting(example.MODEL, "d"), 1, "mlp").measured


def test_an_error_row_without_a_metric_answers_for_all() -> None:
    where = {"data": "d", "cut": 1, "defence": "none", "defence_params": {}}
    m = Measurements([example.row(where, "mlp", None, None, None, None, 0, error="killed")])
    assert m.cell(Setting(example.MODEL, "d"), 1, "mlp", metric="bleu").reason == "killed"


def test_seeds_are_averaged_and_their_intervals_joined() -> None:
    where = {"data": "d", "cut": 1, "defence": "none", "defence_params": {}}
    rows = [
        example.row(where, "mlp", "token_accuracy", v, v - 0.01, v + 0.01, 3) | {"seed": i}
        for i, v in enumerate((0.2, 0.4))
    ]
    found = Measurements(rows).cell(Setting(example.MODEL, "d"), 1, "mlp")
    assert (found.value, found.low, found.high, found.seeds) == pytest.approx((0.3, 0.19, 0.41, 2))


def test_defences_are_named_as_the_command_line_names_them() -> None:
    assert Measurements(example.rows()).defences == ["none", "gaussian:0.1", "int8", "encrypted"]
    where = {"data": "d", "cut": 1, "defence": "gaussian", "defence_params": {"sigma": 0.5}}
    rows = [*example.rows(), example.row(where, "mlp", "token_accuracy", 0.1, 0.1, 0.1, 3)]
    assert "gaussian:0.5" in Measurements(rows).defences


@pytest.mark.parametrize(
    "change", [{"value": "high"}, {"value": True}, {"cut": "1"}, {"seconds": []}], ids=lambda change: str(change)
)
def test_malformed_rows_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="row 1"):
        Measurements([example.rows()[0] | change])


def test_rows_and_texts_that_lack_a_field_are_refused(tmp_path: Path) -> None:
    row, text = example.rows()[0], example.texts()[0]
    del row["metric"], text["correct"]
    with pytest.raises(ConfigurationError, match="lacks metric"):
        Measurements([row])
    with pytest.raises(ConfigurationError, match="lacks correct"):
        examples([text])
    with pytest.raises(ConfigurationError, match="different lengths"):
        examples([example.texts()[0] | {"correct": [True]}])
    with pytest.raises(ConfigurationError, match="no row of that data set"):
        write_report(example.rows(), [example.texts()[0] | {"data": "elsewhere"}], example.meta(), tmp_path)


# Numbers.


def test_shares_never_round_to_certainty() -> None:
    assert percent(1.0) == "100\u202f%"
    assert percent(0.9999) == "99.9\u202f%"
    assert percent(0.0) == "0\u202f%"
    assert percent(0.0001) == "0.1\u202f%"
    assert percent(0.94) == "94.0\u202f%"
    assert in_prose(0.8741) == "87\u202f%"
    assert in_prose(0.9999) == "99.9\u202f%"
    assert percent(math.nan) == plain(math.nan) == "not measured"
    assert percent_range(0.5, math.nan) == ""
    assert plain(-12345.0) == "−12\u202f345"


@pytest.mark.parametrize("top", [1e-3, 0.7, 1, 7.25, 8, 9.99, 1234])
def test_axes_reach_the_top_in_a_few_round_steps(top: float) -> None:
    end, ticks = nice(top)
    assert ticks[0] == 0
    assert top <= end <= 2 * top + 1e-12
    assert 3 <= len(ticks) <= 7
    assert end == pytest.approx(ticks[-1])


# The page.


def test_the_page_shows_everything_it_was_given(tmp_path: Path) -> None:
    words = page(tmp_path).words
    for expected in (
        *example.ATTACKS,
        "gaussian:0.1",
        "× 1.31",
        "28.0 where the undefended model has 21.4",
        "× 22.3 undefended",
        "whole model on the device",
        "MemoryError: 2.0 GB asked for",
        "bounded reader",
        "two points",
        "not a ranking",
        "Luo et al., CCS 2025",
        "MemoryError: 4.1 GB asked for",
        "splitveil audit --model",
        "2.13.0",
        "7d0f7d0f",
        "6,000 windows of 48 tokens",
        "Maria Keller",
        "99th percentile",
        "seconds to learn",
        "up to log₂",
        "transcripts of consultations",
    ):
        assert expected in words, expected


def test_how_the_attackers_learnt_and_which_of_them_had_too_little_time(tmp_path: Path) -> None:
    words = page(tmp_path).words
    for expected in (
        "Still getting better when learning ended: mlp (1 of 2 times) and revert (1 of 3 times).",
        "nearest 1 none 4 356 540",
        "mlp 1 none 79 104 1 234 540 98.9 % 99.1 % had flattened",
        "321 540 81.4 % 87.5 % ? still rising",
        "100 % every token right",
        "1 234 540 99.1 % not recorded",
    ):
        assert expected in words, expected
    without = page(tmp_path, learning=[]).words
    assert "How they learnt" not in without
    assert "Still getting better" not in without


def test_the_best_attack_of_each_cut_is_marked(tmp_path: Path) -> None:
    found = page(tmp_path)
    stars = [attributes for tag, attributes in found.elements if "best" in (attributes.get("class") or "").split()]
    assert len(stars) == len(example.CUTS) * len(example.TEXTS)


def test_the_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    found = page(tmp_path)
    for tag, attributes in found.elements:
        assert tag not in {"script", "iframe", "object", "embed", "img", "base", "form"}
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "action", "data", "srcset", "poster", "xlink:href"):
            value = attributes.get(name) or ""
            assert not value or value.startswith("#") or value == "data:,", (tag, name, value)
    text = (tmp_path / "report.html").read_text()
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    policy = next(a["content"] for t, a in found.elements if t == "meta" and a.get("http-equiv"))
    assert (policy or "").startswith("default-src 'none'")


def test_markup_in_any_text_stays_text(tmp_path: Path) -> None:
    rows, texts, meta = example.poisoned()
    text = write_report(rows, texts, meta, tmp_path).read_text()
    found = Page(text)
    assert "script" not in {tag for tag, _ in found.elements}
    assert "img" not in {tag for tag, _ in found.elements}
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
    assert text.count("&lt;script&gt;") > 100
    for drawing in (tmp_path / "plots").iterdir():
        assert "<script" not in drawing.read_text()
        ET.parse(drawing)


def test_characters_that_act_are_replaced_in_texts(tmp_path: Path) -> None:
    item = example.texts()[0]
    item["recovered"] = ["\u202eevil", "\x1b[31m", "\ud800", *item["recovered"][3:]]
    text = write_report(example.rows(), [item], example.meta(), tmp_path).read_text()
    assert not set("\u202e\x1b\ud800") & set(text)
    assert "\ufffdevil" in text


def test_nothing_but_rows_still_makes_a_page(tmp_path: Path) -> None:
    where = {"data": "d", "cut": 0, "defence": "none", "defence_params": {}}
    rows = [example.row(where, "mlp", "token_accuracy", 0.5, None, None, 3)]
    found = Page(write_report(rows, [], {"title": "One row"}, tmp_path).read_text())
    assert "50.0" in found.words
    assert "After the embeddings" in found.words
    assert "Side by side" not in found.words
    nothing = Page(write_report([], [], {"title": "No rows"}, tmp_path).read_text())
    assert "Nothing was measured." in nothing.words


# Texts.


def test_side_by_side_counts_and_marks() -> None:
    first = next(e for e in examples(example.texts()) if e.data == "personal data")
    best = first.recovered[0]
    assert (best.attack, best.right) == ("search", best.tokens)
    assert best.personal_right == best.personal > 0
    assert [r.defence for r in first.recovered] == ["none"] * 4 + ["encrypted"]
    labels = {run.label for run in first.original if run.kind == "personal"}
    assert labels == {"NAME", "ADDRESS", "CARD"}
    assert "".join(run.text for run in first.original) == example.TEXTS["personal data"][0][0]
    weak = next(r for r in first.recovered if r.attack == "pooled")
    assert {run.kind for run in weak.runs} >= {"wrong", "leaked", "kept"}
    assert any("∅" in run.text for r in first.recovered for run in r.runs)


def test_long_texts_are_cut_and_say_so(tmp_path: Path) -> None:
    item = example.item("personal data", 9, "word " * 400, {}, "mlp", "none", 1.0, random.Random(1))
    shown = examples([item])[0]
    assert shown.more == shown.recovered[0].more == len(item["original"]) - 160 > 0
    assert f"and {shown.more} more tokens" in page(tmp_path, texts=[item]).words


def test_of_defended_crossings_the_best_attack_is_shown(tmp_path: Path) -> None:
    weak = [t | {"attack": "lens", "defence": "int8"} for t in example.texts() if t["attack"] == "mlp"]
    best = [t | {"attack": "search", "defence": "int8"} for t in example.texts() if t["attack"] == "mlp"]
    words = page(tmp_path, texts=[*example.texts(), *weak, *best]).words
    assert "search, under int8" in words
    assert "lens, under int8" not in words


def test_texts_come_in_turn_from_each_cut_and_with_personal_data_first(tmp_path: Path) -> None:
    texts = [t | {"cut": cut} for cut in example.CUTS for t in reversed(example.texts())]
    words = page(tmp_path, texts=texts).words
    heads = re.findall(r"Prompt (\d+), cut after block (\d)", words)
    assert [int(cut) for _, cut in heads[:6]] == [1, 3, 6, 1, 3, 6]
    assert [prompt for prompt, _ in heads[:9]] == ["2"] * 3 + ["0"] * 3 + ["1"] * 3


def test_controls_are_not_shown_as_recovered_texts() -> None:
    items = [example.texts()[0] | {"attack": name} for name in ("floor", "oracle")]
    assert examples(items) == []


# Plots.


def test_plots_are_files_of_their_own_and_say_what_they_show(tmp_path: Path) -> None:
    found = page(tmp_path)
    names = {p.name for p in (tmp_path / "plots").iterdir()}
    frontiers = [f"frontier-{{}}-cut{cut}-{kind.name}" for cut in example.CUTS for kind in KINDS]
    kinds = [f"{kind}-{{}}" for kind in ("recovery", "information", "information-text", "defences")]
    assert names == {f"{kind.format(n)}.svg" for kind in (*kinds, *frontiers) for n in (1, 2)}
    ids = [a["id"] for _, a in found.elements if a.get("id")]
    assert len(ids) == len(set(ids))
    for path in sorted((tmp_path / "plots").iterdir()):
        root = ET.parse(path).getroot()
        space = "{http://www.w3.org/2000/svg}"
        title, description = root.find(f"{space}title"), root.find(f"{space}desc")
        assert title is not None
        assert title.text
        assert description is not None
        assert "%" in (description.text or "") or "bits" in (description.text or "")
        assert "style" in {child.tag.removeprefix(space) for child in root}
        width, height = (float(v) for v in root.attrib["viewBox"].split()[2:])
        for element in root.iter(f"{space}text"):
            assert 0 <= float(element.attrib["x"]) <= width
            assert 0 <= float(element.attrib["y"]) <= height


def test_labels_of_lines_do_not_cover_each_other(tmp_path: Path) -> None:
    write_report(example.rows(), [], example.meta(), tmp_path)
    for path in (tmp_path / "plots").glob("recovery-*.svg"):
        labels = [e for e in ET.parse(path).getroot().iter() if "name" in e.attrib.get("class", "").split()]
        heights = sorted(float(label.attrib["y"]) for label in labels)
        assert len(heights) == len(example.ATTACKS) + 1
        assert all(b - a >= 13.9 for a, b in itertools.pairwise(heights))


def test_a_failed_measurement_is_a_gap_in_the_line_and_not_a_zero(tmp_path: Path) -> None:
    write_report(example.rows(), [], example.meta(), tmp_path)
    description = (tmp_path / "plots" / "recovery-1.svg").read_text()
    assert "optimise: 97\u202f% after block 1, 71\u202f% after block 3;" in description


def test_rows_survive_their_file(tmp_path: Path) -> None:
    again = [json.loads(json.dumps(r)) for r in example.rows()]
    first = write_report(example.rows(), example.texts(), example.meta(), tmp_path / "a").read_text()
    assert write_report(again, example.texts(), example.meta(), tmp_path / "b").read_text() == first
