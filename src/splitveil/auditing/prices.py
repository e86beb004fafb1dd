"""What a defence costs: how much worse the model predicts, what crosses, and how long protecting takes."""

import math
import time
from collections.abc import Sequence

import torch

from splitveil.auditing.grid import FAILURES, Grid, Unit, one_line
from splitveil.auditing.stage import BATCH
from splitveil.split import cut

UNREADABLE = "not measured: the cloud half cannot read what crosses"


def prices(grid: Grid, units: Sequence[Unit]) -> dict[str, dict[str, str]]:
    """By defence, then by column, in words for the report.

    Perplexity is the model's own on the attacked prompts, predicting each token from the defended crossing of those
    before it. Bytes are those of a position's numbers at their stated width, without scales or framing.
    """
    found: dict[str, dict[str, str]] = {}
    for unit in {(unit.cut, unit.spec): unit for unit in units}.values():
        try:
            perplexity, size, seconds = _measured(grid, unit)
        except FAILURES as error:
            found.setdefault(unit.spec, {})[f"perplexity, cut {unit.cut}"] = f"not measured: {one_line(error)}"
            continue
        columns = found.setdefault(unit.spec, {})
        columns[f"perplexity, cut {unit.cut}"] = UNREADABLE if math.isnan(perplexity) else f"{perplexity:.1f}"
        columns["bytes a token"] = f"{size:,.0f}"
        columns["µs a token"] = f"{1e6 * seconds:.1f}"
    return found


@torch.no_grad()
def _measured(grid: Grid, unit: Unit) -> tuple[float, float, float]:
    """(perplexity, NaN where the crossing has another width; bytes; seconds) for each token."""
    split, victims = cut(grid.model, unit.cut), grid.victims
    where = split.device.model.device
    ids, mask = victims.tokens.clamp(min=0).to(where), victims.mask.to(where)
    surprise, predicted, seconds, size, readable = 0.0, 0, 0.0, 0.0, True
    for start in range(0, len(ids), BATCH):
        rows, present = ids[start : start + BATCH], mask[start : start + BATCH]
        plain = split.device(rows, present)
        begun = time.perf_counter()
        crossing = unit.defence.protect(plain)
        seconds += time.perf_counter() - begun
        bits = unit.defence.params.get("bits", 8 * crossing.hidden.element_size())
        size = crossing.width * float(bits) / 8
        readable = crossing.width == plain.width
        if not readable:
            continue
        logits = split.cloud(crossing)[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
        surprise += float((losses * present[:, 1:]).sum())
        predicted += int(present[:, 1:].sum())
    perplexity = math.exp(surprise / predicted) if readable and predicted else math.nan
    return perplexity, size, seconds / int(mask.sum())
