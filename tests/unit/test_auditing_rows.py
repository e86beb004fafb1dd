"""Rows survive whatever interrupts them; damage that is no interruption is named and not touched."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from auditing_support import SHADOW, VICTIMS, create_attack, create_defence, tiny_model, tiny_tokenizer

from splitveil.auditing.audit import audit
from splitveil.auditing.metrics import METRICS
from splitveil.auditing.rows import Lines, Row, Store
from splitveil.errors import ConfigurationError, DataError


def rows(unit: int, value: float = 0.5) -> list[Row]:
    """What one attack appends."""
    return [
        Row(f"{unit}{metric}", "m", "d", unit, "fake", "none", {}, 0, metric, value, 0.25, 0.75, 9, 1.5)
        for metric in METRICS
    ]


def test_rows_come_back(tmp_path: Path) -> None:
    store = Store(tmp_path / "new" / "folder")
    store.append(rows(1), [{"key": "a", "original": ["é", "\u2028"]}])
    store.append(rows(2), [])
    assert store.rows() == rows(1) + rows(2)
    assert store.texts() == [{"key": "a", "original": ["é", "\u2028"]}]


def test_not_measured_is_null_and_never_a_number(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.append(rows(1, math.nan), [])
    line = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])
    assert line["value"] is None
    assert list(line) == [
        *("key", "model", "data", "cut", "attack", "defence", "defence_params", "seed", "metric"),
        *("value", "low", "high", "prompts", "seconds", "error"),
    ]
    assert math.isnan(store.rows()[0].value)


def test_a_torn_last_line_is_dropped_wherever_it_was_torn(tmp_path: Path) -> None:
    store, path = Store(tmp_path), tmp_path / "rows.jsonl"
    store.append(rows(1), [])
    whole = path.read_bytes()
    store.append(rows(2)[-1:], [])
    both = path.read_bytes()
    for size in range(len(whole), len(both)):
        path.write_bytes(both[:size])
        assert store.rows() == rows(1)
        assert path.read_bytes() == whole
    path.write_bytes(both)
    assert store.rows() == rows(1) + rows(2)[-1:]


def test_half_of_an_append_is_dropped_as_a_whole(tmp_path: Path) -> None:
    store, path = Store(tmp_path), tmp_path / "rows.jsonl"
    store.append(rows(1), [])
    whole = path.read_bytes()
    store.append(rows(2), [])
    both = path.read_bytes()
    for size in range(len(whole), len(both), 31):
        path.write_bytes(both[:size])
        assert store.rows() == rows(1)
    path.write_bytes(both[: len(whole) // 2])
    assert store.rows() == []
    assert path.read_bytes() == b""


def test_the_latest_row_of_a_key_counts(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.append(rows(1, 0.1), [])
    store.append(rows(2, 0.2), [])
    store.append(rows(1, 0.3), [])
    assert store.rows() == rows(1, 0.3) + rows(2, 0.2)


@pytest.mark.parametrize("damage", [b"not json\n", b'{"key": "a"}\n', b"7\n", b"\n"])
def test_damage_elsewhere_is_an_error_and_nothing_is_lost(tmp_path: Path, damage: bytes) -> None:
    store, path = Store(tmp_path), tmp_path / "rows.jsonl"
    store.append(rows(1), [])
    content = path.read_bytes() + damage
    store.append(rows(2), [])
    path.write_bytes(content + path.read_bytes())
    before = path.read_bytes()
    with pytest.raises(DataError, match=f"line {len(METRICS) + 1} "):
        store.rows()
    assert path.read_bytes() == before


def test_folders_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="is a file"):
        Store(tmp_path / "file")
    with pytest.raises(ConfigurationError, match="cannot be made"):
        Store(tmp_path / "file" / "below")


def test_one_run_at_a_time(tmp_path: Path) -> None:
    refused = pytest.raises(ConfigurationError, match="another audit")
    with Store(tmp_path).locked(), refused, Store(tmp_path).locked():
        pass
    with Store(tmp_path).locked():
        pass


def test_an_append_is_one_line_for_each_object(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "a.jsonl")
    lines.append([])
    lines.append([{"a": "\n"}, {"b": 1}])
    assert (tmp_path / "a.jsonl").read_bytes() == b'{"a": "\\n"}\n{"b": 1}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        lines.append([{"a": math.nan}])
    assert len(lines.read()) == 2


def test_a_full_disk_ends_an_audit_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "out" / "rows.jsonl"))

    how: dict[str, Any] = {"cuts": (0,), "attacks": ("fake",), "tokens": 12, "windows": 20}
    how |= {"create_attack": create_attack, "create_defence": create_defence, "shadow": SHADOW}
    model, tokenizer = tiny_model(), tiny_tokenizer()
    monkeypatch.setattr(Lines, "append", full)
    with pytest.raises(DataError, match=r"rows\.jsonl cannot be written: No space left on device; what was measured"):
        audit(model, tokenizer, VICTIMS, out=tmp_path / "out", **how)
    monkeypatch.undo()
    assert audit(model, tokenizer, VICTIMS, out=tmp_path / "out", **how).valid
