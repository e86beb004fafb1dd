"""Reading prompts: every format, marked personal data, and errors that name the place and never the text."""

import json
from pathlib import Path
from typing import Any

import pytest

from splitveil.auditing.data import Span, Text, as_texts, read_texts
from splitveil.errors import DataError


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def found(path: Path, column: str | None = None) -> list[str]:
    return [text.text for text in read_texts(path, column)]


def test_a_text_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    assert found(written(tmp_path, "a.txt", "\ufeffone\r\n\n  \ntwo words\n")) == ["one", "two words"]


def test_tables(tmp_path: Path) -> None:
    quoted = 'id,note\n1,"two\nlines, ""quoted"""\n2,plain\n'
    assert found(written(tmp_path, "a.csv", quoted), "note") == ['two\nlines, "quoted"', "plain"]
    assert found(written(tmp_path, "b.CSV", "question,n\nwhy?,1\n")) == ["why?"]
    assert found(written(tmp_path, "c.tsv", 'n\ttext\n1\t"a stray quote\n2\tb\n')) == ['"a stray quote', "b"]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x0c", "\x0b", "\x1c", "\x85"])
def test_what_unicode_calls_a_line_separator_ends_no_prompt(tmp_path: Path, mark: str) -> None:
    assert found(written(tmp_path, "a.txt", f"one{mark}two\nthree\rfour")) == [f"one{mark}two", "three", "four"]
    assert found(written(tmp_path, "a.csv", f"text,n\none{mark}two,1\n"), "text") == [f"one{mark}two"]
    assert found(written(tmp_path, "b.tsv", f"text\tn\none{mark}two\t1\n"), "text") == [f"one{mark}two"]


def test_json(tmp_path: Path) -> None:
    objects = [{"prompt": "a\u2028b", "n": 1}, {"prompt": "c"}]
    lines = "\n".join(json.dumps(one, ensure_ascii=False) for one in objects)
    assert found(written(tmp_path, "a.jsonl", lines)) == ["a\u2028b", "c"]
    assert found(written(tmp_path, "a.json", json.dumps(objects))) == ["a\u2028b", "c"]
    assert found(written(tmp_path, "b.json", '["a", "b"]')) == ["a", "b"]
    assert found(written(tmp_path, "b.jsonl", '"a"\n\n"b"\n')) == ["a", "b"]


def marked(**changes: Any) -> str:
    span = {"start_position": 5, "end_position": 8, "entity_type": "PERSON", "entity_value": "Ann"} | changes
    return json.dumps([{"full_text": "I am Ann.", "spans": [span]}, {"full_text": "no one"}])


def test_marked_personal_data(tmp_path: Path) -> None:
    texts = read_texts(written(tmp_path, "a.json", marked()))
    assert texts == [Text("I am Ann.", (Span(5, 8, "PERSON"),)), Text("no one")]


@pytest.mark.parametrize(
    ("name", "content", "column", "said"),
    [
        ("a.txt", "", None, "holds no text"),
        ("a.txt", " \n\t\n", None, "holds no text"),
        ("a.txt", b"caf\xe9", None, "not UTF-8"),
        ("a.txt", "secret", "text", "no columns"),
        ("a.pdf", "secret", None, "not one of .txt"),
        ("a.json", "", None, "holds no text"),
        ("a.json", "[]", None, "holds no text"),
        ("a.json", '[{"text":\n "secret"', None, "line 2: not JSON"),
        ("a.json", '{"text": "secret"}', None, "holds a dict"),
        ("a.json", '[{"text": "secret"}, "secret"]', None, "entry 1: a str where"),
        ("a.json", '[{"text": "secret"}, {"text": 7}]', None, "entry 1: 'text' should be a string, got int"),
        ("a.json", '[{"text": "secret"}, {}]', None, "entry 1: 'text' should be a string, got nothing"),
        ("a.json", "[7]", None, "entry 0: a int"),
        ("a.json", "[" * 100_000, None, "not JSON"),
        ("a.jsonl", '{"text": "secret"}\n\n{"text": secret}', None, "line 3: not JSON"),
        ("a.jsonl", '{"text": "secret"}', "body", "no column 'body'; its columns are 'text'"),
        ("a.jsonl", '{"body": "secret"}', None, "none of its columns has a usual name; name one of 'body'"),
        ("a.jsonl", '{"text": "secret", "prompt": "x"}', None, "several of its columns"),
        ("a.csv", "text\nsecret,too many\n", None, "line 2: expected 1 cells"),
        ("a.csv", "text,n\nsecret\n", None, "line 2: expected 2 cells"),
        ("a.csv", 'text\n"secret', None, "unexpected end of data"),
        ("a.csv", "text,text\nsecret,b\n", None, "names a column twice"),
        ("a.csv", "text\n" + "x" * 200_000, None, "larger than field limit"),
        ("a.json", marked(start_position="5"), None, "whole numbers"),
        ("a.json", marked(entity_type=None), None, "a string entity_type"),
        ("a.json", marked(end_position=90), None, "characters 5 to 90 of a text with 9"),
        ("a.json", marked(start_position=8), None, "characters 8 to 8"),
        ("a.json", marked(entity_value="Bob"), None, "is not its entity_value"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, name: str, content: str | bytes, column: str | None, said: str) -> None:
    with pytest.raises(DataError) as caught:
        read_texts(written(tmp_path, name, content), column)
    assert said in str(caught.value)
    assert name in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_texts(tmp_path / "absent.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        read_texts(tmp_path / "folder.txt")


def test_texts_from_python() -> None:
    assert as_texts(["a", " ", Text("b")]) == [Text("a"), Text("b")]
    with pytest.raises(DataError, match="text 1 is a int"):
        as_texts(["a", 7])  # type: ignore[list-item]
    with pytest.raises(DataError, match="no text"):
        as_texts([])
