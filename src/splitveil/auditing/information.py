"""The information profile beside the attacks: bits by block as rows, and whether they predict the attack scores.

Rows are called ``information:ESTIMATOR`` where it is asked about the token at a position, and
``information:ESTIMATOR-text`` where it is asked about the whole text. Metric ``bits`` has the estimate and its
interval, ``bits_floor`` the same on permuted pairs. An estimator that refuses has a row with its reason and no value.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from splitveil.auditing.grid import FAILURES, Grid, Step, Watch, one_line
from splitveil.auditing.intervals import UNMEASURED, Figure
from splitveil.auditing.outcome import is_control, scores
from splitveil.auditing.rows import INFORMATION, Row, Store
from splitveil.auditing.stage import cross, public_embeddings
from splitveil.defences.none import Plain
from splitveil.information.correlation import spearman
from splitveil.information.estimate import Estimate
from splitveil.information.profile import QUESTIONS, TEXT, profile
from splitveil.split import cut

BITS, FLOOR = "bits", "bits_floor"
NOTHING = "none"
REFUSED = "refused: "


@dataclass(frozen=True)
class Profile:
    """What the report says about the profile besides its rows."""

    correlation: Sequence[Mapping[str, Any]] = ()
    """By estimator: rank correlation over cuts with the mean score of the attacks, undefended."""
    estimators: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By name: when its figure may be believed, and its source."""


def profile_blocks(grid: Grid, store: Store, blocks: int, watch: Watch) -> Profile:
    """Measures what is missing at cuts 0 to ``blocks``, keeps it, and compares with the attack scores kept so far."""
    names = [row_name(question.estimator.name, question.target) for question in QUESTIONS]
    wanted = {block: {grid.setting.information_key(block, name, BITS) for name in names} for block in range(blocks + 1)}
    kept = {row.key for row in store.rows() if row.error is None or row.error.startswith(REFUSED)}
    for block, keys in wanted.items():
        if not keys <= kept:
            try:
                found = _measured(grid, block, blocks, watch)
            except FAILURES as error:
                found = [_row(grid, block, name, BITS, UNMEASURED, 0.0, one_line(error)) for name in names]
            store.append(found, [])
    ours = {key for keys in wanted.values() for key in keys}
    rows = store.rows()
    bits = [row for row in rows if row.key in ours]
    return Profile(correlation(bits, [row for row in scores(rows) if grid.owns(row)]), _described())


def row_name(estimator: str, target: str) -> str:
    """What stands in place of an attack's name."""
    return f"{INFORMATION}{estimator}" + ("-text" if target == TEXT else "")


def correlation(bits: Sequence[Row], attacks: Sequence[Row]) -> list[dict[str, Any]]:
    """Spearman's ρ over cuts, by estimator, of bits with the mean score of all attacks that have one at each cut.

    None in place of NaN, with the reason.
    """
    plain = [row for row in attacks if row.defence == NOTHING and not is_control(row.attack)]
    by_attack: dict[str, dict[int, float]] = {}
    for row in plain:
        if not math.isnan(row.value):
            by_attack.setdefault(row.attack, {})[row.cut] = row.value
    cuts = sorted({row.cut for row in plain})
    everywhere = [values for values in by_attack.values() if set(values) == set(cuts)]
    mean = {cut: sum(v[cut] for v in everywhere) / len(everywhere) for cut in cuts} if everywhere else {}
    found = []
    for name in dict.fromkeys(row.attack for row in bits):
        measured = {row.cut: row.value for row in bits if row.attack == name}
        rank = spearman([measured.get(cut, math.nan) for cut in mean], list(mean.values()))
        found.append(
            {
                "estimator": name,
                "rho": _or_none(rank.rho),
                "low": _or_none(rank.low),
                "high": _or_none(rank.high),
                "p_value": _or_none(rank.p_value),
                "points": rank.points,
                "reason": rank.reason,
            }
        )
    return found


def _measured(grid: Grid, block: int, blocks: int, watch: Watch) -> list[Row]:
    victims = grid.victims
    begun = time.perf_counter()
    crossing = cross(cut(grid.model, block), Plain(), victims)
    found = profile(
        [(block, crossing)],
        victims.tokens.clamp(min=0),
        public_embeddings(grid.model).cpu(),
        seed=grid.setting.seed,
        progress=lambda done, note: watch(Step(block, blocks + 1, f"information, cut {block}", done, note)),
        total=1,
    )
    seconds = (time.perf_counter() - begun) / len(found)
    return [
        row for one in found for row in _rows(grid, block, row_name(one.estimator, one.target), one.estimate, seconds)
    ]


def _rows(grid: Grid, block: int, name: str, estimate: Estimate, seconds: float) -> list[Row]:
    prompts = len(grid.victims.tokens)
    figures = {
        BITS: Figure(estimate.bits, estimate.low, estimate.high, prompts),
        FLOOR: Figure(estimate.floor, math.nan, math.nan, prompts),
    }
    if estimate.refused:
        figures = {BITS: UNMEASURED}
    error = REFUSED + estimate.reason if estimate.refused else None
    return [_row(grid, block, name, metric, figure, seconds, error) for metric, figure in figures.items()]


def _row(grid: Grid, block: int, name: str, metric: str, figure: Figure, seconds: float, error: str | None) -> Row:
    return Row(
        key=grid.setting.information_key(block, name, metric),
        model=grid.setting.model,
        data=grid.setting.data,
        cut=block,
        attack=name,
        defence=NOTHING,
        defence_params={},
        seed=grid.setting.seed,
        metric=metric,
        value=figure.value,
        low=figure.low,
        high=figure.high,
        prompts=figure.prompts,
        seconds=seconds,
        error=error,
    )


def _described() -> dict[str, dict[str, str]]:
    return {
        row_name(question.estimator.name, question.target): {
            "applies": question.estimator.applies,
            "source": question.estimator.source,
        }
        for question in QUESTIONS
    }


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
