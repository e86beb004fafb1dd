"""Text as windows of token ids, and the order in which training sees them."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from splitveil.errors import ConfigurationError, DataError


def make_windows(tokenizer: Any, texts: Sequence[str], length: int, seed: int = 0) -> Tensor:
    """(count, length) token ids: the documents in an order drawn from ``seed``, one after another, cut into windows.

    An end token, where the tokenizer has one, stands between documents. The rest that fills no window is left out.
    Raises ``ConfigurationError`` for a length below 2, ``DataError`` where the texts do not fill one window.
    """
    if length < 2:
        raise ConfigurationError(f"a window has at least 2 tokens, one to predict the other, got {length}")
    ids: list[int] = []
    between = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    for index in torch.randperm(len(texts), generator=_generator(seed, "documents")).tolist():
        ids += [*tokenizer(texts[index], add_special_tokens=False)["input_ids"], *between]
    count = len(ids) // length
    if count == 0:
        raise DataError(f"the texts are {len(ids)} tokens long, expected at least a window of {length}; add texts")
    return torch.tensor(ids[: count * length]).view(count, length)


def hold_out(windows: Tensor, share: float) -> tuple[Tensor, Tensor | None]:
    """(windows to learn from, windows held out): the last ``share`` of them, at least one where ``share`` is above 0.

    Raises ``ConfigurationError`` for a share outside [0, 1), ``DataError`` where nothing would be left to learn from.
    """
    if not 0 <= share < 1:
        raise ConfigurationError(f"the held-out share is from 0 up to 1, got {share}")
    count = 0 if share == 0 else max(1, round(share * len(windows)))
    if count >= len(windows):
        raise DataError(f"{len(windows)} windows are too few to hold {count} out; add texts or shorten the windows")
    return (windows, None) if count == 0 else (windows[:-count], windows[-count:])


def rows_of_step(count: int, step: int, size: int, seed: int) -> list[int]:
    """Which ``size`` of ``count`` windows step ``step``, from 0, learns from.

    All windows once, in an order drawn from ``seed`` and the epoch, then all of them again in another order. The answer
    depends on nothing else: what position a run is at, is its number of steps.
    """
    rows = []
    epoch, order = -1, torch.empty(0, dtype=torch.long)
    for place in range(step * size, (step + 1) * size):
        if place // count != epoch:
            epoch = place // count
            order = torch.randperm(count, generator=_generator(seed, f"epoch {epoch}"))
        rows.append(int(order[place % count]))
    return rows


def digest_windows(windows: Tensor) -> str:
    """64 hex digits of windows (count, length), by which a resumed run knows its data. Not their text."""
    content = windows.to(torch.int64).contiguous().numpy().tobytes()
    return hashlib.sha256(repr(tuple(windows.shape)).encode() + content).hexdigest()


def _generator(seed: int, purpose: str) -> torch.Generator:
    drawn = hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(drawn, "big") >> 1)
