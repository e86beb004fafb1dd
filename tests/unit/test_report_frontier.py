"""The frontier: which marks it has, where their names stand, and which sentences the figures allow."""

import itertools
import math
import random
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import report_example as example

from splitveil.errors import ConfigurationError
from splitveil.report import write_report
from splitveil.report.findings import findings
from splitveil.report.frontier import KINDS, Mark, Scale, marks, panels
from splitveil.report.labels import Box, place, shortened
from splitveil.report.measurements import Cell, Measurements, Setting
from splitveil.report.meta import Meta
from splitveil.report.prices import Price, priced, times
from splitveil.report.standing import Standing

HERE = Setting(example.MODEL, "personal data")


def mark(
    defence: str,
    value: float,
    *,
    ratio: float = 1.0,
    size: float = 192.0,
    standing: Standing = Standing.ABOVE,
    doubt: str = "",
    half: float = 0.01,
    whole: bool = False,
) -> Mark:
    cell = Cell(value, value - half, value + half, 64)
    return Mark(defence, "search", cell, standing, doubt, ratio, 3.0, size, whole)


NONE = mark("none", 0.95)
FLOOR = Standing.FLOOR


def said(*protected: Mark) -> str:
    return " ".join(findings([NONE, *protected], [])).replace("\u202f", " ")


# Sentences.


def test_what_is_at_the_floor_and_costs_no_perplexity_is_the_exception_and_its_other_prices_are_named() -> None:
    text = said(mark("encrypted", 0.03, standing=FLOOR, size=4288, whole=True), mark("int8", 0.9))
    assert "No defence here is both at the floor and free of a loss in perplexity, except encrypted" in text
    assert "whole model on the device, × 22.3 the bytes of the undefended crossing, 3.00 µs a token" in text


def test_a_floor_that_costs_perplexity_is_not_free() -> None:
    text = said(mark("gaussian:3", 0.03, ratio=240, standing=FLOOR), mark("int8", 0.9))
    assert "No defence here is both at the floor and free: the least that the floor costs is × 240" in text
    assert "except" not in text


def test_a_floor_whose_perplexity_was_not_measured_is_not_called_free() -> None:
    text = said(mark("odd", 0.03, ratio=math.nan, standing=FLOOR))
    assert "what that costs in perplexity was not measured" in text
    assert "except" not in text


def test_without_a_defence_at_the_floor_none_is_said_to_be_and_open_ones_are_named() -> None:
    text = said(mark("int8", 0.9), mark("topk:0.1", 0.04, standing=Standing.UNKNOWN))
    assert "No defence here is shown to bring every attack to the floor" in text
    assert "Of topk:0.1 it cannot be told whether the floor is reached." in text


def test_intervals_that_meet_tell_no_difference() -> None:
    assert "Under int8 it cannot be shown that less is recovered than without a defence (95 %)" in said(
        mark("int8", 0.935)
    )
    assert "cannot be shown" not in said(mark("int8", 0.92))
    better, worse = mark("a", 0.5, ratio=1.2), mark("b", 0.53, ratio=1.2)
    assert "a leaves less than b, at no higher perplexity and with no more bytes." in said(better, worse)
    assert "leaves less" not in said(better, mark("b", 0.515, ratio=1.2))  # intervals meet
    assert "leaves less" not in said(better, mark("b", 0.53, ratio=1.1))  # cheaper
    assert "leaves less" not in said(better, mark("b", 0.53, ratio=1.2, size=52))  # smaller
    assert "leaves less" not in said(better, mark("b", 0.53, ratio=math.nan))


def test_the_least_that_is_left_at_a_price_names_those_that_may_be_as_strong() -> None:
    text = said(mark("a", 0.5, ratio=1.05), mark("b", 0.51, ratio=1.02), mark("c", 0.3, ratio=1.9))
    assert "at most × 1.10 the perplexity, the least that is left is 50 % (a, or b, whose intervals meet its own)" in (
        text
    )
    assert "at most × 2.00 the perplexity, the least that is left is 30 % (c)" in text
    assert text.count("the least that is left") == 2
    assert said(mark("a", 0.5)).count("the least that is left") == 1  # at either price the same
    open_ = said(mark("int8", 0.935))
    assert "at most × 1.10 the perplexity, no defence here is shown to leave less than none does." in open_
    assert "the least that is left" not in open_
    assert "(regularised:dcor-1)" in said(mark("regularised:frontier/stories3M/dcor-1/personal", 0.3))
    assert "the least that is left" not in said(mark("encrypted", 0.03, standing=FLOOR, whole=True))


def test_nothing_is_concluded_where_the_best_attack_failed_or_the_report_is_invalid() -> None:
    text = said(mark("odd", 0.03, doubt="search has no result: out of time"), mark("int8", 0.9))
    assert "Nothing can be said of odd: search has no result: out of time." in text
    assert text.count("odd") == 1
    assert findings([NONE, mark("int8", 0.9)], ["the truth scored 0.98"]) == ["Nothing: this report is invalid."]
    assert findings([mark("int8", 0.9)], []) == ["Nothing: no attack on the unprotected crossing has a result."]
    weak = mark("none", 0.03, doubt="no attack of this audit succeeds on the unprotected crossing")
    assert findings([weak, mark("int8", 0.03)], []) == [
        "Nothing: no attack of this audit succeeds on the unprotected crossing."
    ]


# Marks.


def found(rows: list[dict[str, Any]], cut: int = 1) -> dict[str, Mark]:
    about = Meta.of(example.meta())
    return {mark.defence: mark for mark in marks(Measurements(rows), about.prices, HERE, cut)}


def test_marks_have_the_best_attack_and_the_prices_at_their_cut() -> None:
    at = found(example.rows())
    assert list(at) == ["none", "gaussian:0.1", "int8", "encrypted"]
    assert at["none"].attack == "search"
    assert at["gaussian:0.1"].ratio == pytest.approx(1.31)
    assert (at["encrypted"].size, at["encrypted"].whole_model) == (4288.0, True)
    assert at["encrypted"].standing is Standing.FLOOR
    assert not any(one.doubt for one in at.values())
    assert math.isnan(found(example.rows(), 3)["int8"].ratio)


@pytest.mark.parametrize(
    ("change", "doubt"),
    [
        ({"value": None, "low": None, "high": None, "error": "out of time"}, "search, the best attack on the unprot"),
        ({"low": None, "high": None}, "without an interval"),
        ({"prompts": 3}, "3 prompts are too few"),
    ],
)
def test_a_mark_is_doubted_where_the_best_attack_failed_or_has_no_interval(change: dict[str, Any], doubt: str) -> None:
    rows = [r | change if (r["attack"], r["defence"]) == ("search", "int8") else r for r in example.rows()]
    at = found(rows)
    assert doubt in at["int8"].doubt
    assert not at["gaussian:0.1"].doubt


def test_attacks_that_never_succeed_put_every_mark_in_doubt() -> None:
    rows = [r for r in example.rows() if r["attack"] in {"lens", "floor", "oracle"}]
    rows = [r | {"value": 0.03, "low": 0.028, "high": 0.032} if r["attack"] == "lens" else r for r in rows]
    assert all("no attack of this audit succeeds" in one.doubt for one in found(rows).values())


# Drawings.


def test_names_cover_neither_each_other_nor_a_mark_and_stay_inside() -> None:
    draw = random.Random(1)
    frame = Box(40, 20, 390, 320)
    for count in (1, 5, 18):
        names = [f"gaussian:{draw.random():.{draw.randrange(1, 6)}f}" for _ in range(count)]
        spots = [(draw.uniform(50, 120), draw.uniform(25, 60)) for _ in range(count - 1)] + [(50.0, 25.0)]
        placed = place(names, spots, 6, frame)
        assert placed is not None
        assert placed == place(names, spots, 6, frame)
        assert all(frame.holds(label.box) for label in placed)
        assert not any(a.box.meets(b.box) for a, b in itertools.combinations(placed, 2))
        around = [Box(x - 6, y - 6, x + 6, y + 6) for x, y in spots]
        assert not any(label.box.meets(box) for label in placed for box in around)


def test_a_line_crosses_a_box_or_does_not() -> None:
    box = Box(0, 0, 10, 10)
    assert box.crossed((-5, 5), (15, 5))
    assert box.crossed((-1, 8), (8, -1))
    assert box.crossed((5, 5), (5, 30))
    assert not box.crossed((-5, 12), (15, 12))
    assert not box.crossed((-5, 5), (-1, 5))
    assert not box.crossed((-1, -6), (-1, 20))
    assert not box.crossed((8, -4), (14, 3))


def test_a_frame_without_room_is_refused_and_a_plot_then_grows() -> None:
    assert place(["some name"] * 30, [(60.0, 40.0)] * 30, 6, Box(40, 20, 200, 120)) is None
    crowd = [NONE, *(mark(f"regularised:some/where/run-{i:08}", 0.9) for i in range(16))]
    (drawn, *_) = panels(crowd, Cell(0.03, 0.02, 0.04, 64), HERE, 1, "crowd")
    names = [e for e in ET.fromstring(drawn.plot.file()).iter() if e.attrib.get("class") == "name"]
    assert len(names) == 17
    assert drawn.plot.height > 400


def test_long_names_are_shortened_and_paths_keep_their_end() -> None:
    assert shortened("regularised:/somewhere/far/dcor-10/") == "regularised:dcor-10"
    assert shortened("regularised:frontier/stories3M/dcor-1/personal") == "regularised:dcor-1"
    assert shortened("regularised:personal") == "regularised:personal"
    assert shortened("gaussian:0.1") == "gaussian:0.1"
    assert len(shortened("x" * 80)) == 22


@pytest.mark.parametrize(
    "values", [[1.0, 1.0], [0.1, 30.0], [52.0, 4288.0], [1.0, 1.3], [1e-3, 10.0], [0.1, 1e7], [3.0, 3.0001], [0.0, 5.0]]
)
def test_axes_have_a_few_ticks_inside_and_in_order(values: list[float]) -> None:
    scale = Scale.of(values)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 7
    places = [scale.x(tick) for tick in ticks]
    assert places == sorted(set(places))
    assert all(44 <= x <= 394 for x in [*places, *map(scale.x, values)])


def test_what_a_plot_cannot_show_is_named_and_one_mark_makes_no_plot() -> None:
    at = list(found(example.rows(), 3).values())
    drawn = panels(at, Cell(0.03, 0.02, 0.04, 64), HERE, 3, "p")
    assert [panel.absent for panel in drawn] == [["int8"], [], []]
    assert "int8" not in drawn[0].plot.description
    assert "gaussian:0.1: 71" in drawn[0].plot.description
    assert panels(at[:1], Cell(0.03, 0.02, 0.04, 64), HERE, 3, "p") == []


def test_doubted_marks_are_hollow(tmp_path: Path) -> None:
    rows = [r | {"prompts": 3} if r["defence"] == "int8" else r for r in example.rows()]
    write_report(rows, [], example.meta(), tmp_path)
    drawing = (tmp_path / "plots" / "frontier-1-cut1-bytes.svg").read_text()
    assert drawing.count(' doubt"') == 1
    assert "nothing follows from it: 3 prompts are too few" in drawing


def test_an_invalid_report_draws_no_conclusion(tmp_path: Path) -> None:
    text = write_report(example.rows(), [], example.meta(invalid=["broken"]), tmp_path).read_text()
    assert "Nothing: this report is invalid." in text
    assert "except encrypted" not in text


# Prices.


def test_prices_are_of_their_own_data_and_cut() -> None:
    point = {"cut": 1, "perplexity": 22.0, "undefended": 20.0, "microseconds": 1.0}
    raw = {"bytes_a_token": 52, "whole_model": False, "points": [point | {"data": HERE.data}]}
    price = Price.of("int8", raw)
    assert price.at(HERE, 1).ratio == pytest.approx(1.1)
    assert math.isnan(price.at(HERE, 2).ratio)
    assert math.isnan(price.at(Setting(example.MODEL, "others"), 1).ratio)
    words = priced({"int8": price}, "int8", HERE, 2)
    assert (words.perplexity, words.perplexity_note) == ("not measured", "its price was not measured")
    assert priced({}, "int8", HERE, 1).size == "not measured"
    assert times(1.314) == "×\u202f1.31"


@pytest.mark.parametrize(
    "raw",
    [
        *("× 1.31", [], {"bytes_a_token": "52"}, {"bytes_a_token": True}, {"bytes_a_token": -1}),
        *({"points": [{}]}, {"points": [{"cut": "x"}]}, {"points": [{"cut": 1, "perplexity": "low"}]}),
    ],
)
def test_prices_that_are_no_numbers_are_refused(raw: Any) -> None:
    with pytest.raises(ConfigurationError, match="price of 'int8'"):
        Price.of("int8", raw)


def test_every_kind_of_price_has_words() -> None:
    assert [kind.words(kind.value(mark("a", 0.5, ratio=1.31))).replace("\u202f", " ") for kind in KINDS] == [
        "× 1.31 the perplexity",
        "3.00 µs a token",
        "192 bytes a token",
    ]
