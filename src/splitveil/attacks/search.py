"""``search``: exact recovery with the device half's weights, one token after the other, certified."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from splitveil.attacks.attack import Effort, Progress, Recovery
from splitveil.attacks.knowledge import Access, Knowledge, WhiteBox
from splitveil.attacks.search_calibration import Calibration, calibrate, distances
from splitveil.attacks.search_prefix import Entries, Prefixes, placed
from splitveil.attacks.search_ranking import Ranking, Recorder, fit_ranking, until
from splitveil.errors import ConfigurationError
from splitveil.split import Crossing

NEARLY = 0.02
"""Two embeddings are twins that are no further apart than this share of their length. Others differ by much more."""
CORRECTING = 16
"""Candidates after which failures no longer correct the ranking: what is left is a scan."""


@dataclass(repr=False)
class _Position:
    """What is known about one position of all texts while candidates are tried. All tensors have a row a text."""

    target: Tensor
    """(texts, width) what crossed."""
    tokens: Tensor
    """The nearest candidate so far, -1 before the first."""
    distance: Tensor
    """Its relative distance."""
    second: Tensor
    """The distance of the nearest other candidate."""
    evaluations: Tensor
    failures: Tensor
    """(texts, width) sum of the ranking's residuals."""
    tried: Tensor
    """(texts, vocabulary) of bool."""
    entries: Entries = field(default_factory=list)
    """The nearest candidate's place in the cache."""


class Search:
    """Extends every prefix token by token: candidates run through the device half until one's activation is the
    crossing's.

    Two candidates are tried first, so that there always is a runner-up; then one at a time, each failure correcting
    the ranking; then more and more, to the whole vocabulary if need be. Where calibration on texts of the attacker's
    own shows that the truth cannot be told from other tokens by its distance (noise), ``patience`` candidates are
    tried and the nearest is taken. A text in which the whole vocabulary failed once gets ``patience`` candidates a
    position from then on: the attacker does not have what computed this crossing.

    ``recover`` reports, a number a position:

    - ``evaluations``: sequences run through the device half for it;
    - ``distance``: ‖crossing − candidate‖ / ‖crossing‖ of the token returned;
    - ``gap``: the same of the runner-up, minus ``distance``. The runner-up is the nearest other token *among those
      tried*, at least the one that the ranking holds next likeliest; tokens never tried might be nearer;
    - ``certified``: 1 where the distance is within the tolerance and the runner-up's is not, else 0. Tokens with one
      and the same embedding, or nearly (rows that were never trained, such as a byte's that no text has), cross alike:
      little or nothing tells them apart, and none of them is ever certified.

    An evaluation is one candidate, batched or not. What ``fit`` spends is counted in ``fitted``, not there.
    """

    name: ClassVar[str] = "search"
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[Access]] = frozenset({Access.WEIGHTS})
    source: ClassVar[str] = "SipIt (Nikolaou et al. 2025), with a learnt ranking of this project"
    summary: ClassVar[str] = "tries tokens in the device half until one gives exactly what crossed"

    def __init__(self, *, patience: int = 64, limit: int | None = None) -> None:
        """``limit`` bounds the candidates a position; without it the whole vocabulary is tried if it must be."""
        self.patience = patience
        self.limit = limit
        self.fitted = 0
        """Sequences run through the device half outside the search itself: for ranking and calibration."""
        self._white_box: WhiteBox | None = None
        self._ranking: Ranking | None = None
        self._calibrations: dict[torch.dtype, Calibration] = {}
        self._protected = True

    def fit(self, knowledge: Knowledge, effort: Effort, progress: Progress) -> None:
        """Learns the ranking and the tolerance from random texts; a few seconds for a small model."""
        white_box = knowledge.white_box
        before = white_box.evaluations
        more_time = until(effort.seconds)
        self._white_box = white_box
        self._calibrations = {}
        self._protected = _matches_protected(Recorder(white_box, knowledge.vocabulary, True, effort.seed + 1))
        recorder = Recorder(white_box, knowledge.vocabulary, self._protected, effort.seed)
        self._ranking = fit_ranking(recorder, more_time, progress)
        known = calibrate(white_box, self._ranking, recorder.texts(8), self._protected, None)
        self._ranking.correction = known.correction
        self._calibrations[known.dtype] = known
        self.fitted += white_box.evaluations - before
        progress(1.0, f"tolerance {known.tolerance:.1e}" if known.tolerance else "too noisy to certify")

    def recover(self, crossing: Crossing, progress: Progress) -> Recovery:
        """Token ids by search. Raises ``ConfigurationError`` before ``fit``, and for a crossing of another width."""
        white_box, ranking = self._ready()
        if crossing.width != ranking.width:
            raise ConfigurationError(
                f"search was fitted to crossings of width {ranking.width}, got {crossing.width}: fit it to this cut"
            )
        device = ranking.table.device
        hidden, text = crossing.hidden.to(device), crossing.text.to(device)
        tolerance = self._tolerance(hidden.dtype)
        lengths = text.sum(1)
        # Texts move to the left, whatever side they were padded on: positions count text only.
        order = (~text).to(torch.uint8).argsort(dim=1, stable=True)
        hidden = hidden.gather(1, order[:, :, None].expand_as(hidden))
        tokens = torch.full(text.shape, -1, dtype=torch.long, device=device)
        facts = {
            name: torch.full(text.shape, float("nan"), device=device)
            for name in ("evaluations", "distance", "gap", "certified")
        }
        prefixes = Prefixes(white_box, text.shape[0], device)
        lost = torch.zeros(text.shape[0], dtype=torch.bool, device=device)
        for position in range(int(lengths.max()) if len(lengths) else 0):
            rows = (lengths > position).nonzero()[:, 0]
            found = self._search(prefixes, hidden[:, position], rows, tolerance, lost)
            tokens[rows, position] = found.tokens[rows]
            # At tolerance 0 calibration has shown that distances prove nothing, not even one of 0.
            alike = self._alike(found.tokens.clamp(min=0))
            sure = (found.distance <= tolerance) & (found.second > tolerance) & ~alike
            sure &= tolerance > 0
            gap = (found.second - found.distance).masked_fill(alike, 0.0)
            facts["evaluations"][rows, position] = found.evaluations[rows]
            facts["distance"][rows, position] = found.distance[rows]
            facts["gap"][rows, position] = gap[rows]
            facts["certified"][rows, position] = sure[rows].float()
            prefixes.extend(found.tokens.clamp(min=0), found.entries)
            used = facts["evaluations"].nanmean().item()
            progress((position + 1) / int(lengths.max()), f"{used:.1f} evaluations a token")
        back = order.argsort(1)
        return Recovery(
            tokens.gather(1, back).cpu(), {name: fact.gather(1, back).cpu() for name, fact in facts.items()}
        )

    def _search(self, prefixes: Prefixes, target: Tensor, rows: Tensor, tolerance: float, lost: Tensor) -> _Position:
        """Tries candidates for the texts ``rows`` until each has its token or has had its share."""
        _, ranking = self._ready()
        count, vocabulary = target.shape[0], ranking.vocabulary
        whole = vocabulary if self.limit is None else min(self.limit, vocabulary)
        patience = min(self.patience, whole)
        state = _Position(
            target,
            torch.full_like(target[:, 0], -1, dtype=torch.long),
            target.new_full((count,), torch.inf, dtype=torch.float32),
            target.new_full((count,), torch.inf, dtype=torch.float32),
            target.new_zeros(count, dtype=torch.float32),
            target.new_zeros(target.shape, dtype=torch.float32),
            torch.zeros(count, vocabulary, dtype=torch.bool, device=target.device),
        )
        tried = 0
        while len(rows):
            share = 2 if tried == 0 else 1 if tried < CORRECTING // 2 else tried // 2
            share = min(share, (patience if tried < patience else whole) - tried)
            self._try(prefixes, state, rows, share, tried)
            tried += share
            rows = rows[state.distance[rows] > tolerance]
            if tried >= patience:
                rows = rows[~lost[rows]] if tolerance else rows[:0]
            if tried >= whole:
                lost[rows] = whole == vocabulary
                rows = rows[:0]
        return state

    def _try(self, prefixes: Prefixes, state: _Position, rows: Tensor, share: int, tried: int) -> None:
        """One round: the ``share`` likeliest candidates left for each of the texts ``rows``."""
        _, ranking = self._ready()
        target = state.target[rows].float()
        if prefixes.tokens.shape[1] == 0:
            scores = ranking.first_scores(target)
        else:
            scores = ranking.scores(target, state.failures[rows], min(tried, CORRECTING))
        candidates = scores.masked_fill(state.tried[rows], torch.inf).topk(share, largest=False).indices
        trial = prefixes.attempt(rows.repeat_interleave(share), candidates.reshape(-1))
        hidden = trial.crossed if self._protected else trial.plain
        # A crossing in a coarser dtype than the candidates' was rounded on its way.
        hidden = hidden.to(state.target.dtype).float()
        away = distances(target.repeat_interleave(share, 0), hidden).view(-1, share)
        if tried < CORRECTING:
            context = ranking.residual(hidden, candidates.reshape(-1)).view(*candidates.shape, -1)
            state.failures[rows] += context[:, : CORRECTING - tried].sum(1)
        state.tried[rows] = state.tried[rows].scatter(1, candidates, True)
        state.evaluations[rows] += share

        known = torch.cat([state.distance[rows, None], state.second[rows, None], away], 1)
        best = known.topk(2, largest=False).values
        nearest = away.argmin(1)
        state.distance[rows], state.second[rows] = best[:, 0], best[:, 1]
        better = (away.gather(1, nearest[:, None])[:, 0] < known[:, 0]).nonzero()[:, 0]
        state.tokens[rows[better]] = candidates[better, nearest[better]]
        state.entries = placed(
            state.entries, rows[better], trial.entries, better * share + nearest[better], state.target.shape[0]
        )

    def _alike(self, tokens: Tensor) -> Tensor:
        """Which of ``tokens`` (texts,) have a twin."""
        different, where = torch.unique(tokens, return_inverse=True)
        return twins(self._ready()[0].embeddings(), different)[where]

    def _tolerance(self, dtype: torch.dtype) -> float:
        """The tolerance for crossings of this dtype, calibrated when such crossings are first seen."""
        white_box, ranking = self._ready()
        if dtype not in self._calibrations:
            before = white_box.evaluations
            recorder = Recorder(white_box, ranking.vocabulary, self._protected, 0)
            self._calibrations[dtype] = calibrate(white_box, ranking, recorder.texts(8), self._protected, dtype)
            self.fitted += white_box.evaluations - before
        return self._calibrations[dtype].tolerance

    def _ready(self) -> tuple[WhiteBox, Ranking]:
        if self._white_box is None or self._ranking is None:
            raise ConfigurationError("search has learnt nothing yet: call fit or restore first")
        return self._white_box, self._ranking

    def state(self) -> dict[str, Tensor]:
        """The ranking, and with which side of the defence candidates are compared; tolerances are measured anew."""
        _, ranking = self._ready()
        return {**ranking.state(), "protected": torch.tensor(self._protected), "fitted": torch.tensor(self.fitted)}

    def restore(self, state: Mapping[str, Tensor], knowledge: Knowledge) -> None:
        """Takes the place of ``fit``."""
        self._white_box = knowledge.white_box
        self._ranking = Ranking.restored(state, knowledge.white_box.embeddings().device)
        self._protected = bool(state["protected"])
        self.fitted = int(state["fitted"])
        self._calibrations = {}


def twins(embeddings: Tensor, tokens: Tensor) -> Tensor:
    """Which of ``tokens`` (n,) have an embedding that is nearly another token's: (n,) of bool."""
    chosen = embeddings[tokens].float()
    away = torch.cdist(chosen, embeddings.float())
    away[torch.arange(len(tokens)), tokens] = torch.inf
    nearly: Tensor = away.min(1).values < NEARLY * chosen.norm(dim=1)
    return nearly


def _matches_protected(recorder: Recorder) -> bool:
    """Whether candidates resemble a defended crossing more with the defence than without.

    With it for whatever is deterministic (rounding falls out); without it for noise (which would count twice).
    """
    texts = recorder.texts(8)
    plain, crossed = recorder.plain(texts), recorder.crossings(texts)
    if plain.shape != crossed.shape:
        return True
    again = recorder.candidates(texts)
    return bool((again - crossed).norm() <= (plain - crossed).norm())
