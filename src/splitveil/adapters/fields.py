"""Typed access to the fields of a parsed `adapter_config.json`; what is not as it should be is one line of error."""

import json
from collections.abc import Mapping
from typing import Any, TypeGuard

from splitveil.adapters.matching import NameRule, compile_pattern
from splitveil.errors import AdapterError, UnsupportedAdapterError

MAX_RANK = 1024


def shown(value: object) -> str:
    """A JSON value as it may stand in a message: on one line, and short."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a JSON value is a whole number; Python counts true and false as such too."""
    return isinstance(value, int) and not isinstance(value, bool)


class Fields:
    """The fields of one configuration; `where` names the file in messages.

    Every method raises AdapterError when a field has a value of another kind.
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config = config
        self.where = where

    def wrong(self, name: str, value: object, expected: str) -> AdapterError:
        """The error for a field whose value PEFT would not accept either."""
        return AdapterError(f"{self.where}: {name} = {shown(value)}, expected {expected}; correct the file")

    def unsupported(self, name: str, value: object, expected: str, advice: str) -> UnsupportedAdapterError:
        """The error for a field that asks for something that is not served."""
        return UnsupportedAdapterError(
            f"{self.where}: {name} = {shown(value)} is not supported, expected {expected}; {advice}"
        )

    def flag(self, name: str) -> bool:
        """A field that is false when absent."""
        value = self.config.get(name, False)
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def label(self, name: str) -> str | None:
        """A string or null. Labels are printed to terminals, so that control characters are refused."""
        value = self.config.get(name)
        if value is None:
            return None
        if not isinstance(value, str) or len(value) > 4096 or not value.isprintable():
            raise self.wrong(name, value, "null or a string of at most 4096 printable characters")
        return value

    def number(self, name: str, default: float) -> float:
        """A finite number."""
        return self.as_number(name, self.config.get(name, default))

    def rank(self, name: str, default: int) -> int:
        """A rank; UnsupportedAdapterError where it is above MAX_RANK."""
        return self.as_rank(name, self.config.get(name, default))

    def numbers(self, name: str) -> dict[str, float]:
        """An object whose values are finite numbers."""
        return {key: self.as_number(name, value) for key, value in self._table(name).items()}

    def ranks(self, name: str) -> dict[str, int]:
        """An object whose values are ranks; UnsupportedAdapterError where one is above MAX_RANK."""
        return {key: self.as_rank(name, value) for key, value in self._table(name).items()}

    def as_number(self, name: str, value: object) -> float:
        """`value`, which the field `name` holds, as a finite number."""
        # Whole numbers above 2⁵³ would be rounded, and much larger ones do not fit a float at all.
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 2**53:
            raise self.wrong(name, value, "a finite number")
        return float(value)

    def as_rank(self, name: str, value: object) -> int:
        """`value`, which the field `name` holds, as a rank."""
        if not is_integer(value) or value < 1:
            raise self.wrong(name, value, "a whole number of at least 1")
        if value > MAX_RANK:
            advice = "train with a lower rank, or compress the adapter"
            raise self.unsupported(name, value, f"at most {MAX_RANK}", advice)
        return value

    def names(self, name: str) -> NameRule:
        """A set of module names: a regular expression, or a list of names."""
        value = self.config[name]
        if isinstance(value, str):
            return NameRule(pattern=compile_pattern(value, self.where, name))
        return NameRule(names=frozenset(self.strings(name)))

    def strings(self, name: str) -> list[str]:
        """A list of strings; a single string counts as a list of one."""
        value = self.config[name]
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise self.wrong(name, value, "a string or a list of strings")
        return items

    def integers(self, name: str) -> list[int]:
        """A list of whole numbers from 0 on; a single number counts as a list of one."""
        value = self.config[name]
        items = value if isinstance(value, list) else [value]
        if not all(is_integer(item) and item >= 0 for item in items):
            raise self.wrong(name, value, "null, a whole number from 0 on or a list of them")
        return items

    def _table(self, name: str) -> dict[str, Any]:
        value = self.config.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.wrong(name, value, "an object of patterns and numbers")
        return value
