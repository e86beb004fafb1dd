"""How near a token's recomputed activation comes to its crossing, and how near another token's does."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from splitveil.attacks.knowledge import WhiteBox
from splitveil.attacks.search_prefix import Prefixes
from splitveil.attacks.search_ranking import Ranking

MARGIN = 16.0
"""How many times further than the furthest truth seen a truth may be."""
FLOOR = 1e-6
"""Relative distance that float32 can put between two ways of computing the same, seen in calibration or not."""


@dataclass(frozen=True)
class Calibration:
    """What texts of the attacker's own showed."""

    dtype: torch.dtype
    tolerance: float
    """Relative distance within which a candidate counts as the token; 0 where other tokens come as near."""
    truth: float
    """The largest relative distance of a true token, or one step of the crossing's rounding where that is more."""
    other: float
    """The relative distance that one in twenty of the likeliest wrong tokens stays below."""
    correction: float
    """Regression of a crossing's context on that of the likeliest wrong token in its place, from 0 to 1."""


def distances(target: Tensor, hidden: Tensor) -> Tensor:
    """(n,) relative distances of activations (n, width) from what crossed (n, width)."""
    away: Tensor = (target - hidden).norm(dim=1) / target.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    return away


def calibrate(
    white_box: WhiteBox, ranking: Ranking, texts: Tensor, protected: bool, dtype: torch.dtype | None
) -> Calibration:
    """Lets ``texts`` (n, position) cross in one go, in ``dtype`` if given, and recomputes them as the search does.

    At each position the truth and the likeliest other token are run on the cache.
    """
    crossing = white_box(texts).hidden
    crossing = crossing if dtype is None else crossing.to(dtype)
    prefixes = Prefixes(white_box, texts.shape[0], texts.device)
    rows = torch.arange(texts.shape[0], device=texts.device)
    truths, others, steps = [], [], []
    product = square = 0.0
    for position in range(texts.shape[1]):
        target, token = crossing[:, position].float(), texts[:, position]
        scores = ranking.scores(target, torch.zeros_like(target), 0) if position else ranking.first_scores(target)
        other = scores.scatter(1, token[:, None], torch.inf).argmin(1)
        trial = prefixes.attempt(torch.cat([rows, rows]), torch.cat([token, other]))
        hidden = (trial.crossed if protected else trial.plain).to(crossing.dtype).float()
        own, wrong = hidden[: len(rows)], hidden[len(rows) :]
        truths.append(distances(target, own))
        others.append(distances(target, wrong))
        if protected and trial.plain.shape == trial.crossed.shape:
            steps.append(distances(own, trial.plain[: len(rows)].float()))
        if position:
            context, shown = ranking.residual(target, token), ranking.residual(wrong, other)
            product += float((context * shown).sum())
            square += float(shown.square().sum())
        entries = [None if e is None else (e[0][: len(rows)], e[1][: len(rows)]) for e in trial.entries]
        prefixes.extend(token, entries)
    near = float(torch.cat(others).quantile(0.05))
    truth = max(float(torch.cat(truths).max()), FLOOR)
    if steps:
        # An entry that is rounded to the other side, too rare to count on here: a uniform error of variance step²/12.
        step = float(torch.cat(steps).median()) * math.sqrt(12 / crossing.shape[2])
        truth = max(truth, min(step, near / 64))
    tolerance = min(MARGIN * truth, math.sqrt(truth * near)) if 2 * truth < near else 0.0
    correction = min(max(product / square, 0.0), 1.0) if square else 0.0
    return Calibration(crossing.dtype, tolerance, truth, near, correction)
