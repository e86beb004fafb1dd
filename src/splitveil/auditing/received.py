"""What came back from a worker: taken only if it is what this unit could have come to, number by number.

Rows are kept before anything is made of them, so one that no report can be made of would stand in the folder for good.
"""

import json
import math
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from splitveil.auditing.grid import Grid, Unit
from splitveil.auditing.intervals import Figure
from splitveil.auditing.metrics import METRICS
from splitveil.auditing.outcome import ORACLE
from splitveil.auditing.rows import Row
from splitveil.auditing.shown import side_by_side
from splitveil.errors import ProtocolError

MAX_LEARNT = 2**32
"""Bytes of what one attacker learnt."""
MAX_ERROR = 10_000
"""Characters."""
_FACT = re.compile(r"[a-z][a-z0-9_]{0,63}")
_SLACK = 1e-9
"""Of rounding, at the ends of a range."""


def checked(grid: Grid, unit: Unit, answer: Any) -> tuple[list[Row], list[dict[str, Any]], bytes | None]:
    """(rows, texts, what was learnt) of an answer. Raises ``ProtocolError`` for one that is not the unit's."""
    prompts = grid.victims.tokens
    limit = 2**20 + 2**10 * prompts.numel()
    if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], bytes)):
        raise ProtocolError("a worker answered with something that is no measurement")
    content, learnt = answer
    if len(content) > limit:
        raise ProtocolError(f"a worker answered with {len(content)} bytes of rows and texts, at most {limit} are taken")
    if learnt is not None and not (isinstance(learnt, bytes) and len(learnt) <= MAX_LEARNT):
        raise ProtocolError(f"a worker answered with something learnt that is not at most {MAX_LEARNT} bytes")
    try:
        found = json.loads(content, parse_constant=_no_number)
        rows = [Row.from_dict(row) for row in found["rows"]]
        texts = list(found["texts"])
        same = all(row.as_dict() == _as_ours(grid, unit, row).as_dict() for row in rows)
        whole = _whole(rows)
        sound = all(_sound(row, len(prompts)) for row in rows)
        theirs = _theirs(grid, unit, texts, failed=bool(rows) and rows[-1].error is not None)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ProtocolError(f"a worker's answer cannot be read: {type(error).__name__}") from None
    if not (same and whole):
        raise ProtocolError(f"a worker answered with rows that are not those of {unit.label}")
    if not sound:
        raise ProtocolError(f"a worker answered with rows of {unit.label} that cannot have been measured")
    if not theirs:
        raise ProtocolError(f"a worker answered with texts that are not those of {unit.label}")
    return rows, texts, learnt


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")


def _as_ours(grid: Grid, unit: Unit, row: Row) -> Row:
    """The row as it would be here, but for what was measured."""
    figure = Figure(row.value, row.low, row.high, row.prompts)
    return grid.row(unit, row.metric, figure, row.seconds, row.error)


def _whole(rows: Sequence[Row]) -> bool:
    """One row that says why there are none; or every metric once, the closing one at the end, and facts before it."""
    metrics = [row.metric for row in rows]
    if len(set(metrics)) < len(metrics) or not metrics or metrics[-1] != METRICS[-1]:
        return False
    if rows[-1].error is not None:
        return len(rows) == 1
    return set(METRICS) <= set(metrics) and all(m in METRICS or _FACT.fullmatch(m) for m in metrics)


def _sound(row: Row, prompts: int) -> bool:
    """Whether these numbers can be those of a measurement."""
    counted = type(row.prompts) is int and 0 <= row.prompts <= prompts
    timed = math.isfinite(row.seconds) and row.seconds >= 0
    if row.error is not None:
        told = isinstance(row.error, str) and 0 < len(row.error) <= MAX_ERROR
        return counted and timed and told and all(map(math.isnan, (row.value, row.low, row.high)))
    numbers = (row.value, row.low, row.high)
    if all(map(math.isnan, numbers)):  # a metric that does not apply, as to text without personal data
        return counted and timed and row.metric != METRICS[-1]
    if not math.isfinite(row.value) or any(map(math.isinf, numbers)):
        return False
    least, most = (-1.0, 1.0) if row.metric == "cosine" else (0.0, 1.0 if row.metric in METRICS else math.inf)
    within = all(math.isnan(n) or least - _SLACK <= n <= most + _SLACK for n in numbers)
    return counted and timed and within and not row.low > row.high  # too few prompts have no interval


def _theirs(grid: Grid, unit: Unit, texts: Sequence[Any], *, failed: bool) -> bool:
    """Whether the texts are of the prompts that are shown, as those were, with something in place of each token."""
    if failed:
        return not texts
    about, victims = grid.about(unit), grid.victims
    shown = [] if unit.attack == ORACLE else list(side_by_side(grid.tokenizer, victims, victims.tokens))
    if len(shown) != len(texts):
        return False
    return all(_is_text(text, about | truth) for text, truth in zip(texts, shown, strict=True))


def _is_text(text: dict[str, Any], truth: dict[str, Any]) -> bool:
    own = ("recovered", "correct")
    given = {name: value for name, value in text.items() if name not in own}
    if text.keys() != truth.keys() or given != {name: value for name, value in truth.items() if name not in own}:
        return False
    tokens = len(truth["original"])
    recovered, correct = text["recovered"], text["correct"]
    if not (isinstance(recovered, list) and isinstance(correct, list)) or {len(recovered), len(correct)} != {tokens}:
        return False
    return all(isinstance(piece, str) for piece in recovered) and all(isinstance(right, bool) for right in correct)
