"""Prefixes under a white-box search: one step of the device half for many candidates, on one cache."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from splitveil.attacks.knowledge import WhiteBox
from splitveil.split import Crossing

ROWS = 256
"""Sequences in one call of the device half."""

Entries = list[tuple[Tensor, Tensor] | None]
"""By block: keys and values (rows, heads, 1, width) of one position; None for a block that caches nothing."""


@dataclass(frozen=True, repr=False)
class Trial:
    """What came of candidates that were tried."""

    plain: Tensor
    """(candidates, width) the activation before the defence."""
    crossed: Tensor
    """(candidates, width of the crossing) the same after the defence, in the dtype that crosses."""
    entries: Entries
    """The candidates' own place in the cache."""


class Prefixes:
    """Texts of equal length without padding that grow by one token at a time.

    A candidate runs on a copy of the cache that shares its tensors, so nothing has to be taken back when it fails;
    this holds for sliding windows too, which a crop cannot restore. Caches of another kind than keys and values that
    grow (states of linear attention, for one) are not used at all: there every candidate reads its whole text again.
    """

    def __init__(self, white_box: WhiteBox, count: int, device: torch.device) -> None:
        self._white_box = white_box
        self.tokens = torch.zeros(count, 0, dtype=torch.long, device=device)
        """(count, length) the texts so far."""
        cache = white_box.new_cache()
        growing = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
        self._cache = cache if growing else None

    def attempt(self, rows: Tensor, candidates: Tensor) -> Trial:
        """Runs token ``candidates[i]`` (candidates,) after text ``rows[i]`` (candidates,)."""
        parts = [
            self._attempt(r, c) for r, c in zip(torch.split(rows, ROWS), torch.split(candidates, ROWS), strict=True)
        ]
        if len(parts) == 1:
            return parts[0]
        return Trial(
            torch.cat([part.plain for part in parts]),
            torch.cat([part.crossed for part in parts]),
            [_joined(list(column)) for column in zip(*(part.entries for part in parts), strict=True)],
        )

    def _attempt(self, rows: Tensor, candidates: Tensor) -> Trial:
        step = candidates[:, None]
        if self._cache is None:
            plain = self._white_box.plain(torch.cat([self.tokens[rows], step], 1))
            plain = Crossing(plain.hidden[:, -1:], plain.mask)
            entries: Entries = []
        else:
            fork = _fork(self._cache, rows)
            plain = self._white_box.plain(step, None, fork)
            entries = [_last(layer) for layer in fork.layers]
        crossed = self._white_box.protect(plain)
        return Trial(plain.hidden[:, 0], crossed.hidden[:, 0], entries)

    def extend(self, tokens: Tensor, entries: Entries) -> None:
        """Appends ``tokens`` (count,), whose places in the cache are ``entries``."""
        self.tokens = torch.cat([self.tokens, tokens[:, None]], 1)
        if self._cache is None:
            return
        for index, entry in enumerate(entries):
            if entry is not None:
                self._cache.update(*entry, index)


def placed(into: Entries, at: Tensor, entries: Entries, rows: Tensor, count: int) -> Entries:
    """``into`` (for ``count`` texts; empty at first) with ``entries``'s ``rows`` at the texts ``at``."""
    merged: Entries = []
    for index, entry in enumerate(entries):
        if entry is None:
            merged.append(None)
            continue
        old = into[index] if into else None
        keys, values = old or tuple(x.new_zeros(count, *x.shape[1:]) for x in entry)
        keys[at], values[at] = entry[0][rows], entry[1][rows]
        merged.append((keys, values))
    return merged


def _fork(cache: Cache, rows: Tensor) -> Cache:
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in fork.layers:
        if layer.is_initialized:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
    return fork


def _last(layer: DynamicLayer) -> tuple[Tensor, Tensor] | None:
    if not layer.is_initialized:
        return None
    return layer.keys[:, :, -1:], layer.values[:, :, -1:]


def _joined(parts: list[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor] | None:
    some = [part for part in parts if part is not None]
    if not some:
        return None
    return torch.cat([keys for keys, _ in some]), torch.cat([values for _, values in some])
