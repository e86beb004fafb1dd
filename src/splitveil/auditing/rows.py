"""Rows on disk: one JSON object a line, appended once per attack, and whole again after any interruption."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from splitveil.auditing.metrics import METRICS
from splitveil.errors import ConfigurationError, DataError
from splitveil.split.folders import held

INFORMATION = "information:"
"""Begins the name that rows of the information profile have in place of an attack's."""
_NUMBERS = ("value", "low", "high", "seconds")


@dataclass(frozen=True)
class Row:
    """One measurement. NaN, ``null`` in JSON, means not measured; where ``error`` is given, it says why."""

    key: str
    """SHA-256 of what determines the row."""
    model: str
    data: str
    cut: int
    attack: str
    defence: str
    defence_params: Mapping[str, float | int | str]
    seed: int
    metric: str
    value: float
    low: float
    """The interval of 95 % over prompts."""
    high: float
    prompts: int
    seconds: float
    """Wall time of the attack, learning included, also where it was learnt in an earlier run."""
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: None in place of NaN."""
        found = asdict(self)
        return found | {name: None if math.isnan(found[name]) else found[name] for name in _NUMBERS}

    @classmethod
    def from_dict(cls, found: Any) -> "Row":
        """Raises ``ValueError`` for anything that is not such an object."""
        names = [field.name for field in fields(cls)]
        if not isinstance(found, dict) or sorted(found) != sorted(names):
            raise ValueError("not a row of an audit")
        numbers = {name: math.nan if found[name] is None else float(found[name]) for name in _NUMBERS}
        return cls(**(found | numbers))

    @property
    def closes(self) -> bool:
        """Whether the rows that were appended together end here."""
        return self.metric == METRICS[-1] or self.attack.startswith(INFORMATION)


class Lines:
    """A file of JSON lines that is only appended to, each append in one write and on the disk when it returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, objects: Iterable[Mapping[str, Any]]) -> None:
        """Adds the objects; all of them, or after a power cut some and part of one."""
        text = "".join(json.dumps(one, ensure_ascii=False, allow_nan=False) + "\n" for one in objects)
        with self.path.open("ab", buffering=0) as file:
            data = memoryview(text.encode())
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())

    def read(self) -> list[tuple[int, Any]]:
        """(where it ends, in bytes; object) of every whole line. A torn last line is cut off the file.

        Raises ``DataError`` for a line that is not JSON and not the last: that is damage, not an interruption.
        """
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            self.truncate(end)
        found, place = [], 0
        for number, line in enumerate(content[:end].splitlines(keepends=True), 1):
            place += len(line)
            try:
                found.append((place, json.loads(line)))
            except ValueError:
                raise DataError(
                    f"{self.path}, line {number} is not JSON: the file was damaged after it was written; take that "
                    "line out, or give another --out"
                ) from None
        return found

    def truncate(self, size: int) -> None:
        """Cuts the file to ``size`` bytes, on the disk when it returns."""
        with self.path.open("r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())


class Store:
    """An audit's folder: ``rows.jsonl``, ``texts.jsonl`` (prompts and what was recovered), ``fitted/``."""

    def __init__(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise ConfigurationError(f"{folder} is a file; --out is a folder, made where it is missing")
        try:
            (folder / "fitted").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"{folder} cannot be made: {error.strerror}") from None
        self.folder = folder
        self._rows = Lines(folder / "rows.jsonl")
        self._texts = Lines(folder / "texts.jsonl")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder against other runs. Raises ``ConfigurationError`` where one has it."""
        with held(self.folder) as ours:
            if not ours:
                raise ConfigurationError(f"another audit is writing to {self.folder}; wait for it")
            yield

    def rows(self) -> list[Row]:
        """All rows, the latest of each key. What an interrupted append left is cut off first."""
        read, whole = self._rows.read(), 0
        found: list[Row] = []
        for number, (_, value) in enumerate(read, 1):
            try:
                found.append(Row.from_dict(value))
            except (ValueError, TypeError):
                raise DataError(f"{self._rows.path}, line {number} is not a row of an audit") from None
        while found and not found[-1].closes:
            found.pop()
        if len(found) < len(read):
            whole = read[len(found) - 1][0] if found else 0
            self._rows.truncate(whole)
        return list({row.key: row for row in found}.values())

    def texts(self) -> list[dict[str, Any]]:
        """What attacks recovered, as kept for the report; several with the same ``key`` and prompt may be there."""
        return [value for _, value in self._texts.read()]

    def append(self, rows: Iterable[Row], texts: Iterable[Mapping[str, Any]]) -> None:
        """Keeps one attack's rows. The texts go first, so that rows are never without theirs."""
        self._texts.append(texts)
        self._rows.append(row.as_dict() for row in rows)
