"""What a defence costs: how much worse the model predicts, what crosses, and how long protecting takes."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from splitveil.auditing.grid import FAILURES, Grid, Unit, one_line
from splitveil.auditing.stage import BATCH
from splitveil.defences.encrypted import EncryptedQuery
from splitveil.split import Crossing, Split, cut

PASSES = 3
"""Of which the fastest counts: whatever else a machine does only ever adds."""
UNREADABLE = "the cloud half cannot read what crosses"


@dataclass(frozen=True)
class Point:
    """What a defence costs at one cut on one data set; None where nothing was measured, and ``reason`` says why."""

    data: str
    cut: int
    perplexity: float | None
    """Of the model on the attacked prompts, each token predicted from the defended crossing of those before it. Of the
    whole undefended model where the defence keeps all of it on the device."""
    undefended: float | None
    """Of the whole undefended model on the same tokens."""
    microseconds: float | None
    """A token, for protecting on this machine in batches; neither the network nor the model is in it."""
    reason: str = ""


@dataclass(frozen=True)
class Price:
    """What a defence costs."""

    bytes_a_token: float
    """In the smallest exact form on the wire, for states in float32."""
    whole_model: bool
    """Whether the whole model runs on the device, since no upper blocks could go on from what crosses."""
    points: tuple[Point, ...]

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self) | {"points": [asdict(point) for point in self.points]}


def prices(grid: Grid, units: Sequence[Unit]) -> dict[str, dict[str, Any]]:
    """By defence: a ``Price`` as JSON holds it. Numbers; the report makes words of them."""
    wanted = {(unit.cut, unit.spec): unit for unit in units}.values()
    points: dict[str, list[Point]] = {}
    last: dict[str, Unit] = {}
    plain, width = math.nan, 0
    for unit in wanted:
        if not width:
            split = cut(grid.model, unit.cut)
            plain, width = _perplexity(grid, split, None), _width(grid, split)
        points.setdefault(unit.spec, []).append(_point(grid, unit, plain))
        last[unit.spec] = unit
    return {
        spec: Price(
            last[spec].defence.bytes_a_position(width), isinstance(last[spec].defence, EncryptedQuery), tuple(found)
        ).as_dict()
        for spec, found in points.items()
    }


def _point(grid: Grid, unit: Unit, plain: float) -> Point:
    data, undefended = grid.setting.data, _or_none(plain)
    try:
        split = cut(grid.victims_model(unit.defence), unit.cut)
        seconds, readable = _timed(grid, unit, split)
        perplexity, reason = plain, ""
        if not isinstance(unit.defence, EncryptedQuery):
            perplexity = _perplexity(grid, split, unit) if readable else math.nan
            reason = "" if readable else UNREADABLE
    except FAILURES as error:
        return Point(data, unit.cut, None, undefended, None, one_line(error))
    if not reason and math.isnan(perplexity):
        reason = "the prompts have no token to predict"
    return Point(data, unit.cut, _or_none(perplexity), undefended, 1e6 * seconds, reason)


@torch.no_grad()
def _timed(grid: Grid, unit: Unit, split: Split) -> tuple[float, bool]:
    """(seconds that protecting a token takes, whether upper blocks can read what crosses)."""
    batches = [split.device(rows, present) for rows, present in _batches(grid, split)]
    unit.defence.protect(batches[0].rows(0, 1))  # what is made once, such as a key, is no token's price
    passes = []
    for _ in range(PASSES):
        begun = time.perf_counter()
        crossings = [unit.defence.protect(batch) for batch in batches]
        passes.append(time.perf_counter() - begun)
    seconds = min(passes)
    tokens = sum(int(batch.text.sum()) for batch in batches)
    return seconds / tokens, crossings[0].width == batches[0].width


@torch.no_grad()
def _perplexity(grid: Grid, split: Split, unit: Unit | None) -> float:
    """Under the unit's defence, or with none; NaN where the prompts have no token to predict."""
    surprise, predicted = 0.0, 0
    for rows, present in _batches(grid, split):
        crossing: Crossing = split.device(rows, present)
        if unit is not None:
            crossing = unit.defence.protect(crossing)
            crossing.check_finite()
        logits = split.cloud(crossing)[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
        counted = present[:, 1:] * present[:, :-1]
        surprise += float((losses * counted).sum())
        predicted += int(counted.sum())
    return math.exp(surprise / predicted) if predicted else math.nan


@torch.no_grad()
def _width(grid: Grid, split: Split) -> int:
    """Of an undefended state; it need not be that of the embeddings."""
    rows, present = _batches(grid, split)[0]
    crossing: Crossing = split.device(rows[:1], present[:1])
    return crossing.width


def _batches(grid: Grid, split: Split) -> list[tuple[Tensor, Tensor]]:
    """(ids, mask) of the attacked prompts, a batch at a time."""
    where = split.device.model.device
    ids, mask = grid.victims.tokens.clamp(min=0).to(where), grid.victims.mask.to(where)
    return [(ids[start : start + BATCH], mask[start : start + BATCH]) for start in range(0, len(ids), BATCH)]


def _or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
