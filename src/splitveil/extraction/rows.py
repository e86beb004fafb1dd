"""Rows on disk: one JSON object a measurement, appended when it is made and never measured again."""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from splitveil.errors import ConfigurationError, DataError

_NUMBERS = ("value", "low", "high")


@dataclass(frozen=True)
class Row:
    """One measurement. NaN, ``null`` in JSON, means not measured; where ``error`` is given, it says why."""

    key: str
    """SHA-256 of what determines the measurement that the row belongs to."""
    adapter: str
    attack: str
    rows: int
    """Rows answered for every layer."""
    noise: float
    """δ, a fraction."""
    metric: str
    value: float
    low: float
    high: float
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: None in place of NaN."""
        found = asdict(self)
        return found | {name: None if math.isnan(found[name]) else found[name] for name in _NUMBERS}

    @classmethod
    def from_dict(cls, found: Any) -> "Row":
        """Raises ``ValueError`` for anything that is not such an object."""
        names = {field.name for field in fields(cls)}
        if not isinstance(found, dict) or found.keys() != names:
            raise ValueError("not a row of an extraction")
        return cls(**(found | {name: math.nan if found[name] is None else float(found[name]) for name in _NUMBERS}))


def key_of(*parts: object) -> str:
    """SHA-256, in hex, of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Store:
    """``DIR/rows.jsonl``. A measurement's rows are appended in one write, and are on the disk when that returns."""

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"{folder} cannot be made a folder: {error.strerror}") from None
        self.path = folder / "rows.jsonl"

    def append(self, rows: Iterable[Row]) -> None:
        """Adds the rows of one measurement."""
        text = "".join(json.dumps(row.as_dict(), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        with self.path.open("ab", buffering=0) as file:
            data = memoryview(text.encode())
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())

    def read(self) -> list[Row]:
        """All rows. A torn last line, which an interruption leaves, is cut off the file; so are rows written with it.

        Raises ``DataError`` for any other line that is not a row: that is damage, not an interruption.
        """
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        found = []
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                found.append(Row.from_dict(json.loads(line)))
            except (ValueError, TypeError):
                raise DataError(
                    f"{self.path}, line {number} is not a row; take it out, or give another --out"
                ) from None
        if whole < len(content):
            torn = found[-1].key if found else ""
            lines = content[:whole].splitlines(keepends=True)
            while found and found[-1].key == torn and lines:
                found.pop()
                lines.pop()
            with self.path.open("r+b") as file:
                file.truncate(sum(map(len, lines)))
                os.fsync(file.fileno())
        return found
