"""PEFT's rules for which module names a configuration speaks about, restated without PEFT.

The rules are those of PEFT 0.21 (`check_target_module_exists` and `get_pattern_key`); the tests compare with PEFT
itself. The patterns are the vendor's own and run in the vendor's process, so that a slow one hurts nobody else.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from splitveil.errors import AdapterError

Number = TypeVar("Number", bound=float)

# The lazy prefix finds the first numbered component: the block, not an expert inside of it.
_ANY_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."


def compile_pattern(pattern: str, where: str, field_name: str, *, before: str = "", after: str = "") -> re.Pattern[str]:
    """Compile a regular expression that a configuration holds, framed as PEFT frames it.

    Raises:
        AdapterError: it is not a regular expression; `where` and `field_name` tell the reader which one.
    """
    try:
        return re.compile(before + pattern + after)
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(
            f"{where}: {field_name} holds {pattern[:80]!r}, which is not a regular expression ({error}); correct it"
        ) from None


class PatternTable(Generic[Number]):
    """`rank_pattern` or `alpha_pattern`: values for the modules whose names match a pattern.

    As in PEFT, the first key in the order of the file wins that matches the whole name or a dotted tail of it. (PEFT
    then looks for a key that equals the name. A module name has no special characters but dots, so that as a pattern
    it matches itself, and such a key has been found before.)
    """

    def __init__(self, entries: Mapping[str, Number], where: str, field_name: str) -> None:
        self._patterns = [
            (compile_pattern(key, where, field_name, before=r"(.*\.)?(", after=")$"), value)
            for key, value in entries.items()
        ]

    def get(self, module: str, default: Number) -> Number:
        """The value for `module`, or `default`."""
        for pattern, value in self._patterns:
            if pattern.match(module):
                return value
        return default


@dataclass(frozen=True)
class NameRule:
    """A set of module names: a regular expression for the whole name, or a list of names and dotted tails."""

    pattern: re.Pattern[str] | None = None
    names: frozenset[str] = frozenset()

    def is_exact(self, module: str) -> bool:
        """Whether the list holds the full name of `module`."""
        return module in self.names

    def matches(self, module: str) -> bool:
        """Whether `module` belongs to the set."""
        if self.pattern is not None:
            return self.pattern.fullmatch(module) is not None
        return self.is_exact(module) or any(module.endswith(f".{name}") for name in self.names)


@dataclass(frozen=True)
class LayerRule:
    """`layers_to_transform` and `layers_pattern`: which numbered blocks carry the adapter."""

    indices: frozenset[int]
    patterns: tuple[re.Pattern[str], ...] = field(default=(re.compile(_ANY_LAYER),))

    def matches(self, module: str) -> bool:
        """Whether `module` lies in one of the blocks."""
        for pattern in self.patterns:
            found = pattern.match(module)
            if found is not None:
                # As in PEFT, the first pattern that finds a block decides, even when a later one would find another.
                return int(found["idx"]) in self.indices
        return False


@dataclass(frozen=True)
class TargetRule:
    """Which modules PEFT would adapt under a configuration.

    `targets` is None for "all-linear", where only the base model can tell.
    """

    targets: NameRule | None
    excludes: NameRule
    layers: LayerRule | None

    def matches(self, module: str) -> bool:
        """Whether PEFT would adapt a linear module of this name."""
        if self.excludes.matches(module):
            return False
        if self.targets is None or self.targets.is_exact(module):
            return True
        if not self.targets.matches(module):
            return False
        return self.layers is None or self.layers.matches(module)


def layer_patterns(patterns: list[str], where: str) -> tuple[re.Pattern[str], ...]:
    """Compile `layers_pattern`, the names of the lists that hold the blocks (`layers`, `h`).

    Raises:
        AdapterError: one of them is not a regular expression.
    """
    return tuple(
        compile_pattern(pattern, where, "layers_pattern", before=r"(?:^|.*?\.)", after=r"\.(?P<idx>\d+)\.")
        for pattern in patterns
    )
