"""Rows on disk, the runs that write them, and the command line around both."""

import json
import math
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner
from extraction_support import Small, small

from splitveil.adapters import load_adapter
from splitveil.cli import cli
from splitveil.embedded import folder
from splitveil.errors import ConfigurationError, DataError
from splitveil.extraction import calibrate as calibration
from splitveil.extraction import run as running
from splitveil.extraction.page import write_page
from splitveil.extraction.rows import Row, Store, key_of
from splitveil.extraction.run import Subject, default_rows, run
from splitveil.serving.directions import FILE as DIRECTIONS
from splitveil.serving.directions import read_directions_file


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Small:
    torch.set_num_threads(1)
    return small(tmp_path_factory.mktemp("small"), windows=16)


def row(metric: str, key: str = "k", value: float = 0.5) -> Row:
    return Row(key, "a", "chosen", 64, 0.01, metric, value, math.nan, math.nan)


def test_rows_come_back_as_they_were_and_nan_is_null(tmp_path: Path) -> None:
    store = Store(tmp_path / "new")
    store.append([row("error"), row("perplexity", value=math.nan)])
    lines = [json.loads(line) for line in store.path.read_text().splitlines()]
    fields = ["key", "adapter", "attack", "rows", "noise", "metric", "value", "low", "high", "error"]
    assert [list(line) for line in lines] == [fields, fields]
    assert lines[1]["value"] is None
    found = store.read()
    assert found[0].value == 0.5
    assert math.isnan(found[1].value)


def test_a_torn_line_takes_its_measurement_with_it_and_no_other(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.append([row("error", "first"), row("exact", "first")])
    store.append([row("error", "second"), row("exact", "second")])
    whole = store.path.read_bytes()
    store.path.write_bytes(whole[:-10])
    assert {one.key for one in store.read()} == {"first"}
    assert store.path.read_bytes() == whole[: whole.index(b'{"key": "second"')]


def test_damage_is_not_an_interruption(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.append([row("error"), row("exact")])
    store.path.write_bytes(b"x" + store.path.read_bytes())
    with pytest.raises(DataError, match="line 1"):
        store.read()
    with pytest.raises(ConfigurationError, match="cannot be made"):
        Store(store.path)


def test_keys_tell_everything_apart() -> None:
    assert key_of(1, "a", 2) == key_of(1, "a", 2)
    assert len({key_of(1, "a", 2), key_of(1, "a", 3), key_of(1, "b", 2), key_of("1", "a", 2)}) == 4


def subject(case: Small, text: bool = True) -> Subject:
    return Subject(case.model, case.adapter, case.text if text else None, "small", "digest")


def test_a_run_measures_every_attack_once_and_goes_on_where_it_was(
    case: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(subject(case), rows=(4, 96), noises=(0.0,), out=tmp_path)
    assert {one.attack for one in found} == {"base", "adapter", *running.ATTACKS}
    for attack in ("chosen", "directed", "honest", "trained-A", "initial-A"):
        assert {one.rows for one in found if one.attack == attack} == {4, 96}
    (refused,) = [one for one in found if one.attack == "published"]
    assert refused.error is not None
    assert "out of reach" in refused.error
    assert math.isnan(refused.value)
    assert [one for one in found if one.error] == [refused]
    best = {(one.attack, one.metric): one.value for one in found if one.rows in (0, 96)}
    assert best["chosen", "error"] < 1e-3
    assert best["chosen", "perplexity"] == pytest.approx(best["adapter", "perplexity"], rel=1e-3)

    def never(*_: object) -> None:
        raise AssertionError("it was measured already")

    content = (tmp_path / "rows.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(running, "publish_target", never)
        again = run(subject(case), rows=(4, 96), noises=(0.0,), out=tmp_path)
    assert [one.as_dict() for one in again] == [one.as_dict() for one in found]
    assert (tmp_path / "rows.jsonl").read_bytes() == content
    page = write_page(found, tmp_path, "splitveil extract <&>").read_text()
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert titles == [
        f"{what}, answer noise 0 %" for what in ("Error of ΔW", "Error on text", "What the clone is worth")
    ]
    assert page.count("<tr") == 1 + len({one.key for one in found})
    assert "splitveil extract &lt;&amp;&gt;" in page
    assert "not measured: out of reach" in page
    for drawn in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        assert ElementTree.fromstring(drawn).tag.endswith("svg")
    # Every figure of every attack is a mark that says what it is, and the true adapter is a line across.
    assert all(f">{name}, 96 rows: " in page for name in ("chosen", "directed", "honest", "trained-A", "initial-A"))
    assert page.count(">true adapter, 4 rows: ") == 1
    more = run(subject(case), rows=(8,), noises=(0.0,), out=tmp_path, attacks=("chosen",))
    assert {one.rows for one in more} == {0, 8}


def test_without_text_attacks_that_read_text_are_left_out(case: Small, tmp_path: Path) -> None:
    found = run(subject(case, text=False), rows=(96,), noises=(0.01,), out=tmp_path)
    assert {one.attack for one in found} == {"chosen", "trained-A", "initial-A", "published"}
    metrics = {one.metric for one in found if not one.metric.startswith("error")}
    assert metrics == {"exact", "surprise", "surprise of a wrong guess"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": (0,)}, "rows"),
        ({"rows": ()}, "rows"),
        ({"noises": (-0.1,)}, "noise"),
        ({"attacks": ("telepathy",)}, "telepathy"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(
    case: Small, tmp_path: Path, change: dict[str, tuple[object, ...]], message: str
) -> None:
    asked = {"rows": (4,), "noises": (0.0,), "attacks": ("chosen",)} | change
    with pytest.raises(ConfigurationError, match=message):
        run(subject(case), out=tmp_path / "out", **asked)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_default_rows_are_around_the_width(case: Small) -> None:
    assert default_rows(case.adapter) == (4, 16, 32, 64, 128, 192, 256)


def test_the_command_line_says_hardness_without_an_adapter() -> None:
    result = CliRunner().invoke(cli, ["extract", "--hardness"], catch_exceptions=False)
    assert result.exit_code == 0
    for words in ("148.9", "187.2", "179.6", "answers to random queries", "ckks-", "sealed engine", "ADPS16", "MATZOV"):
        assert words in result.output


def test_the_command_line_attacks_a_folder(case: Small, tmp_path: Path) -> None:
    # Without a tokenizer in the folder, which a random model does not have, the base is the embedded one.
    arguments = ["extract", "--base", "embedded:base", "--adapter", "embedded:clinic", "--rows", "256", "--noise", "0"]
    out = tmp_path / "out"
    result = CliRunner().invoke(cli, [*arguments, "--attack", "trained-A", "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0
    assert "trained-A" in result.output
    assert len((out / "rows.jsonl").read_text().splitlines()) == 31  # 30 modules, and all together


def test_directions_go_into_the_adapters_folder(tmp_path: Path) -> None:
    adapter = shutil.copytree(folder("clinic"), tmp_path / "clinic", ignore=shutil.ignore_patterns(DIRECTIONS))
    data = tmp_path / "text.txt"
    data.write_text("\n".join(["Anemia is a condition in which the blood has too few red cells."] * 60))
    arguments = ["extract", "--base", "embedded:base", "--adapter", str(adapter), "--data", str(data), "--length", "32"]
    result = CliRunner().invoke(cli, [*arguments, "--directions"], catch_exceptions=False)
    assert f"written {adapter / DIRECTIONS}" in result.output
    found = read_directions_file(load_adapter(adapter))
    assert found is not None
    assert len(found) == 30
    assert "model.layers.5.mlp.up_proj" in result.output


def test_a_calibration_begins_with_the_noise_that_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun: list[tuple[float, ...]] = []

    def measured(*_: object, grid: tuple[float, ...], **__: object) -> None:
        begun.append(grid)
        raise ConfigurationError("far enough")

    monkeypatch.setattr(calibration, "calibrate", measured)
    data = tmp_path / "text.txt"
    data.write_text("\n".join(["Anemia is a condition in which the blood has too few red cells."] * 20))
    arguments = [
        "extract",
        "--base",
        "embedded:base",
        "--adapter",
        "embedded:clinic",
        "--data",
        str(data),
        "--calibrate",
    ]
    for more in ([], ["--noise", "0.05,0.2"]):
        result = CliRunner().invoke(cli, [*arguments, "--length", "32", *more])
        assert str(result.exception) == "far enough"
    assert begun == [calibration.GRID, (0.05, 0.2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["extract", "--base", "embedded:base"], "--adapter"),
        (["extract", "--base", "b", "--adapter", "a", "--out", "o", "--calibrate"], "--data"),
        (["extract", "--base", "b", "--adapter", "a", "--data", "d", "--calibrate", "--rows", "8"], "no --rows"),
        (["extract", "--base", "b", "--adapter", "a", "--data", "d", "--calibrate", "--attack", "span"], "no --attack"),
        (["extract", "--base", "b", "--adapter", "a", "--directions"], "--directions measures on held-out text"),
        (["extract", "--base", "b", "--adapter", "a", "--data", "d", "--directions", "--rows", "8"], "no --rows"),
        (
            ["extract", "--base", "b", "--adapter", "a", "--data", "d", "--directions", "--noise", "0"],
            "no --noise and no --out",
        ),
        (["extract", "--base", "b", "--adapter", "a", "--data", "d", "--directions", "--calibrate"], "one of them"),
    ],
)
def test_the_command_line_says_what_is_missing(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli, arguments)
    assert isinstance(result.exception, ConfigurationError)
    assert message in str(result.exception)
