"""Side by side: what was written, and what each attack recovered of it.

What is shown here was made by whoever wrote the prompts and by models: it is escaped like everything in the page, and
characters that could change how the text around them is shown are replaced.
"""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

from splitveil.errors import ConfigurationError
from splitveil.report.measurements import NONE, is_control

MOST_TOKENS = 160
UNMARKED = "plain"
DIRECTIONS = frozenset(("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"))
FIELDS = frozenset(
    ("data", "prompt_index", "cut", "attack", "defence", "original", "recovered", "correct", "personal", "spans")
)


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens that are shown alike.

    ``kind`` is "plain" or "personal" in an original; "right", "wrong", "leaked" (personal, recovered) or "kept"
    (personal, not recovered) in what an attack made of it. ``label`` is the type of personal data, if known.
    """

    kind: str
    text: str
    label: str = ""


@dataclass(frozen=True)
class Recovered:
    """One attack's text, with its counts."""

    attack: str
    defence: str
    runs: list[Run]
    right: int
    tokens: int
    personal_right: int
    personal: int
    more: int
    """Tokens that are not shown."""


@dataclass(frozen=True)
class Example:
    """One prompt at one cut."""

    data: str
    prompt: int
    cut: int
    original: list[Run]
    more: int
    recovered: list[Recovered]


def examples(items: Iterable[Mapping[str, Any]]) -> list[Example]:
    """Grouped by prompt and cut, in order of appearance; the unprotected crossing first, then the best attack.

    ``correct``, ``personal`` and ``spans`` (``start``, ``end``, ``type``) refer to the tokens of ``original``. Raises
    ``ConfigurationError`` if an item lacks a field or its lists are not of one length.
    """
    groups: dict[tuple[str, int, int], list[Mapping[str, Any]]] = {}
    for number, item in enumerate(items, 1):
        missing = FIELDS - item.keys()
        if missing:
            raise ConfigurationError(f"text {number} of the report lacks {', '.join(sorted(missing))}")
        lengths = {name: len(item[name]) for name in ("original", "recovered", "correct", "personal")}
        if len(set(lengths.values())) != 1:
            raise ConfigurationError(f"the lists of text {number} of the report have different lengths: {lengths}")
        if not is_control(str(item["attack"])):
            groups.setdefault((str(item["data"]), int(item["prompt_index"]), int(item["cut"])), []).append(item)
    return [_example(*key, members) for key, members in groups.items()]


def visible(text: str) -> str:
    """``text`` without characters that act instead of being seen: control characters and changes of direction."""
    return "".join(c if c in "\n\t" or not _acts(c) else "\ufffd" for c in text)


def _acts(character: str) -> bool:
    return unicodedata.category(character) in {"Cc", "Cs"} or unicodedata.bidirectional(character) in DIRECTIONS


def _example(data: str, prompt: int, cut: int, members: list[Mapping[str, Any]]) -> Example:
    first = members[0]
    tokens = [str(token) for token in first["original"]]
    labels = _types(len(tokens), first["spans"])
    shown = [
        ("personal" if personal else "plain", token, label if personal else "")
        for token, personal, label in zip(tokens, first["personal"], labels, strict=True)
    ][:MOST_TOKENS]
    recovered = sorted((_recovered(m) for m in members), key=lambda r: (r.defence != NONE, r.defence, -r.right))
    return Example(data, prompt, cut, _runs(shown), len(tokens) - len(shown), recovered)


def _recovered(item: Mapping[str, Any]) -> Recovered:
    shown = []
    for token, correct, personal in zip(item["recovered"], item["correct"], item["personal"], strict=True):
        kind = ("leaked" if personal else "right") if correct else ("kept" if personal else "wrong")
        # A wrong token is always something to see, and keeps to its place in the line.
        text = str(token) if correct else (str(token).replace("\n", "↵") or "∅")
        shown.append((kind, text, ""))
    return Recovered(
        attack=str(item["attack"]),
        defence=str(item["defence"]),
        runs=_runs(shown[:MOST_TOKENS]),
        right=sum(map(bool, item["correct"])),
        tokens=len(shown),
        personal_right=sum(bool(c and p) for c, p in zip(item["correct"], item["personal"], strict=True)),
        personal=sum(map(bool, item["personal"])),
        more=max(0, len(shown) - MOST_TOKENS),
    )


def _runs(tokens: Sequence[tuple[str, str, str]]) -> list[Run]:
    out = []
    for (kind, label), members in groupby(tokens, key=itemgetter(0, 2)):
        text = visible("".join(token for _, token, _ in members))
        word = text.lstrip()
        if word and word != text:  # the space before a marked word is not marked
            out.append(Run(UNMARKED, text[: -len(word)]))
            text = word
        out.append(Run(kind, text, visible(label)))
    return out


def _types(count: int, spans: Iterable[Mapping[str, Any]]) -> list[str]:
    """For each of ``count`` tokens the type of the span that it is in, or nothing."""
    labels = [""] * count
    for span in spans:
        for place in range(max(0, int(span["start"])), min(count, int(span["end"]))):
            labels[place] = str(span["type"])
    return labels
