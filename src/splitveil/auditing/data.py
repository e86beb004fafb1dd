"""Prompts and shadow text from files: plain text, CSV, TSV, JSON and JSON lines, with marked personal data."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitveil.errors import DataError

COLUMNS = ("text", "full_text", "prompt", "question", "dialogue", "content")
"""Names under which a column of texts is found without being named."""
KINDS = (".txt", ".csv", ".tsv", ".json", ".jsonl")


@dataclass(frozen=True)
class Span:
    """Personal data inside a text: the characters from ``start`` up to ``end``, and what they are."""

    start: int
    end: int
    kind: str


@dataclass(frozen=True)
class Text:
    """One prompt, or one document of shadow text."""

    text: str
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True)
class _Record:
    """One entry of a file, and how errors name its place."""

    place: str
    value: Any


def read_texts(path: str | Path, column: str | None = None) -> list[Text]:
    """The texts of a file that hold more than white space, in order.

    - ``.txt``: one text a line.
    - ``.csv``, ``.tsv``: the first line names the columns; a TSV has no quoting.
    - ``.jsonl``: one object, or one string, a line. ``.json``: a list of objects or strings.

    Of objects and tables, ``column`` is read; without it, the one of ``COLUMNS`` that is there. Objects may mark
    personal data: ``"spans": [{"start_position": 5, "end_position": 9, "entity_type": "PERSON"}]``, in characters.

    Raises ``DataError``, naming the line or the entry, and never the text.
    """
    file = Path(path)
    if file.suffix.lower() not in KINDS:
        raise DataError(f"{file} is not one of {', '.join(KINDS)}; the ending says how a file is read")
    try:
        content = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 (byte {error.start}); convert it first") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or type(error).__name__}") from None
    records = list(_READERS[file.suffix.lower()](file, content))
    texts = list(_texts(file, records, column))
    texts = [text for text in texts if text.text.strip()]
    if not texts:
        raise DataError(f"{file} holds no text: it is empty, or white space only")
    return texts


def as_texts(texts: Sequence[str | Text]) -> list[Text]:
    """Strings as texts without marks. Raises ``DataError`` for anything else, and where no text is left."""
    for index, text in enumerate(texts):
        if not isinstance(text, str | Text):
            raise DataError(f"text {index} is a {type(text).__name__}, expected a string")
    found = [text if isinstance(text, Text) else Text(text) for text in texts]
    found = [text for text in found if text.text.strip()]
    if not found:
        raise DataError("there is no text: expected at least one string that is more than white space")
    return found


def _lines(file: Path, content: str) -> Iterator[_Record]:
    # Not splitlines(), here and below: what Unicode calls a line separator, or a form feed, may stand inside a text.
    for number, line in enumerate(io.StringIO(content, newline=None), 1):
        yield _Record(f"line {number}", line.removesuffix("\n"))


def _json_lines(file: Path, content: str) -> Iterator[_Record]:
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                yield _Record(f"line {number}", json.loads(line))
            except ValueError as error:
                raise DataError(f"{file}, line {number}: not JSON ({_reason(error)})") from None


def _json(file: Path, content: str) -> Iterator[_Record]:
    if not content.strip():
        return
    try:
        whole = json.loads(content)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {error.lineno}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON ({_reason(error)})") from None
    if not isinstance(whole, list):
        raise DataError(f"{file} holds a {type(whole).__name__}, expected a list of objects or of strings")
    for index, value in enumerate(whole):
        yield _Record(f"entry {index}", value)


def _table(file: Path, content: str) -> Iterator[_Record]:
    tabs = file.suffix.lower() == ".tsv"
    reader = csv.DictReader(
        io.StringIO(content, newline=""),
        delimiter="\t" if tabs else ",",
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
        strict=not tabs,
    )
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise DataError(f"{file} names a column twice in its first line: {', '.join(names)}")
        for row in reader:
            if None in row or None in row.values():
                raise DataError(f"{file}, line {reader.line_num}: expected {len(names)} cells, as in the first line")
            yield _Record(f"line {reader.line_num}", row)
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.line_num}: {error}") from None


_READERS = {".txt": _lines, ".csv": _table, ".tsv": _table, ".json": _json, ".jsonl": _json_lines}


def _texts(file: Path, records: list[_Record], column: str | None) -> Iterator[Text]:
    objects = [record.value for record in records if isinstance(record.value, dict)]
    if column is not None and not objects and records:
        raise DataError(f"{file} has no columns, so --column {column} cannot be there; leave it out")
    name = _column(file, objects, column) if objects else ""
    for record in records:
        value = record.value
        if isinstance(value, dict):
            if not isinstance(value.get(name), str):
                got = type(value[name]).__name__ if name in value else "nothing"
                raise DataError(f"{file}, {record.place}: {name!r} should be a string, got {got}")
            yield Text(value[name], tuple(_spans(file, record, value[name])))
        elif isinstance(value, str) and not objects:
            yield Text(value)
        else:
            raise DataError(f"{file}, {record.place}: a {type(value).__name__} where the others are not")


def _column(file: Path, objects: list[dict[str, Any]], column: str | None) -> str:
    found = list(objects[0])
    listed = ", ".join(map(repr, found)) or "none"
    if column is not None:
        if column not in found:
            raise DataError(f"{file} has no column {column!r}; its columns are {listed}")
        return column
    usual = [name for name in COLUMNS if name in found]
    if len(usual) != 1:
        why = "none of its columns has a usual name" if not usual else "several of its columns have usual names"
        raise DataError(f"{file}: which column holds the texts? {why}; name one of {listed}")
    return usual[0]


def _spans(file: Path, record: _Record, text: str) -> Iterator[Span]:
    marks = record.value.get("spans", [])
    if not isinstance(marks, list):
        raise DataError(f"{file}, {record.place}: 'spans' should be a list, got {type(marks).__name__}")
    for mark in marks:
        where = f"{file}, {record.place}: a span"
        if not isinstance(mark, dict):
            raise DataError(f"{where} should be an object, got {type(mark).__name__}")
        start, end, kind = (mark.get(key) for key in ("start_position", "end_position", "entity_type"))
        if type(start) is not int or type(end) is not int or not isinstance(kind, str):
            raise DataError(f"{where} needs whole numbers start_position and end_position, and a string entity_type")
        if not 0 <= start < end <= len(text):
            raise DataError(f"{where} covers characters {start} to {end} of a text with {len(text)}")
        if mark.get("entity_value", text[start:end]) != text[start:end]:
            raise DataError(f"{where} at characters {start} to {end} is not its entity_value; is this its column?")
        yield Span(start, end, kind)


def _reason(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
