"""All attacks on one adapter, over rows and noise: rows on disk, and a summary."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from splitveil.adapters import Adapter
from splitveil.errors import ConfigurationError, SplitveilError
from splitveil.extraction.guessed import SEEDS, Guesses
from splitveil.extraction.measure import (
    Judge,
    Measured,
    chosen_queries,
    directed_queries,
    honest_text,
    initial_rows,
    published_half,
    span_of_b,
    trained_rows,
)
from splitveil.extraction.rows import Row, Store, key_of
from splitveil.extraction.target import publish_target
from splitveil.extraction.worth import Text

VERSION = 2
"""Of what is measured: raised with every change that makes older rows incomparable."""
BASE, ADAPTER = "base", "adapter"
"""Stand in an attack's place for the two ends of the scale: no adapter, and the true one through the protocol."""
Attack = Callable[[Judge, int], Measured]
ATTACKS: dict[str, Attack] = {
    "chosen": chosen_queries,
    "directed": directed_queries,
    "honest": honest_text,
    "trained-A": trained_rows,
    "initial-A": initial_rows,
    "span": span_of_b,
    "published": published_half,
}
ONCE = {"published"}
"""Attacks that ask for nothing: measured at 0 rows only."""
FIRST_ROWS = {"span"}
"""Attacks that are about the first r rows only."""
NEEDS_TEXT = {"directed", "honest", "span"}
GUESSES = {"initial-A"}
"""Attacks that depend on what the attacker takes the initial A for."""


@dataclass(frozen=True)
class Subject:
    """What is attacked and what it is judged on. ``names`` say so in the rows; digests decide what is the same."""

    model: Any = field(repr=False)
    adapter: Adapter = field(repr=False)
    text: Text | None = field(repr=False)
    name: str
    digest: str
    """Of base, adapter and text."""
    initial: str = SEEDS
    """Where the attacker looks for the initial A: ``guessed.Guesses``."""


def default_rows(adapter: Adapter) -> tuple[int, ...]:
    """Rows around which something happens: the rank, and parts and multiples of the most common width."""
    widths = [module.d_in for module in adapter.modules]
    width = max(set(widths), key=widths.count)
    rank = max(module.rank for module in adapter.modules)
    return tuple(sorted({rank, width // 4, width // 2, width, 2 * width, 3 * width, 4 * width}))


def run(
    subject: Subject,
    *,
    rows: Sequence[int],
    noises: Sequence[float],
    out: Path,
    attacks: Iterable[str] = tuple(ATTACKS),
    watch: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Measures what is not in ``out`` yet, and returns all rows of this subject, in the order of the plan.

    Raises ``ConfigurationError`` for rows, noises or attacks that make no sense, before anything is measured. An attack
    that fails later has a row with its error.
    """
    chosen = tuple(attacks)
    unknown = [name for name in chosen if name not in ATTACKS]
    if unknown:
        raise ConfigurationError(f"no attack {unknown[0]!r}; there are {', '.join(ATTACKS)}")
    if not rows or min(rows) < 1 or not noises or min(noises) < 0:
        raise ConfigurationError("at least one number of rows from 1 on and one noise from 0 on are needed")
    guesses = Guesses(subject.model, subject.adapter.path, subject.initial)
    store = Store(out)
    kept = store.read()
    done = {row.key for row in kept}
    wanted: list[str] = []
    for noise in noises:
        judge: Judge | None = None  # publishing takes a while, and may not be needed
        for attack, count in _plan(subject, chosen, rows):
            guessed = [subject.initial] if attack in GUESSES else []
            key = key_of(VERSION, subject.digest, attack, count, noise, *guessed)
            wanted.append(key)
            if key in done:
                continue
            watch(f"noise {noise:g}: {attack}, {count} rows" if count else f"noise {noise:g}: {attack}")
            if judge is None:
                judge = Judge(subject.model, publish_target(subject.adapter, noise), subject.text, guesses)
            found = _measure(subject, judge, attack, count, key)
            store.append(found)
            kept += found
            done.add(key)
    place = {key: index for index, key in enumerate(wanted)}
    return sorted((row for row in kept if row.key in place), key=lambda row: place[row.key])


def _plan(subject: Subject, attacks: Sequence[str], rows: Sequence[int]) -> Iterator[tuple[str, int]]:
    """(attack, rows) of one noise, the ends of the scale first."""
    if subject.text is not None:
        yield BASE, 0
        yield ADAPTER, 0
    rank = max(module.rank for module in subject.adapter.modules)
    for attack in attacks:
        if attack in NEEDS_TEXT and subject.text is None:
            continue
        if attack in ONCE:
            yield attack, 0
        elif attack in FIRST_ROWS:
            yield from ((attack, count) for count in sorted({max(1, rank - 1), rank, 2 * rank}))
        else:
            yield from ((attack, count) for count in sorted(set(rows)))


def _measure(subject: Subject, judge: Judge, attack: str, count: int, key: str) -> list[Row]:
    error: str | None = None
    figures: Measured = {}
    try:
        if attack == BASE:
            figures = judge.base()
        elif attack == ADAPTER:
            figures = judge.adapter()
        else:
            figures = ATTACKS[attack](judge, count)
    except SplitveilError as failure:
        error, figures = str(failure), {"error": (np.nan, np.nan, np.nan)}
    noise = judge.target.publication.noise
    return [
        Row(key, subject.name, attack, count, noise, metric, *figure, error=error) for metric, figure in figures.items()
    ]
