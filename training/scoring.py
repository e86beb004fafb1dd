"""Per-token losses of a causal language model over whole documents, whether or not they fit its context."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Window:
    """Tokens ``start:end`` of one document; the tokens from ``first`` on are scored here, the others are context."""

    document: int
    start: int
    first: int
    end: int


def windows(lengths: Sequence[int], context: int) -> list[Window]:
    """Windows of at most ``context`` tokens that overlap by half, each token after the first scored exactly once.

    From the second window on, a token has at least ``context // 2`` tokens before it.
    """
    result = []
    for document, length in enumerate(lengths):
        start, first = 0, 1
        while first < length:
            end = min(start + context, length)
            result.append(Window(document, start, first, end))
            start, first = start + context // 2, end
    return result


def batches(items: list[Window]) -> list[list[Window]]:
    """Windows of similar length together, ``BATCH_TOKENS`` tokens or fewer a batch."""
    result: list[list[Window]] = []
    for item in sorted(items, key=lambda w: w.start - w.end):
        longest = result[-1][0].end - result[-1][0].start if result else 0
        if not result or (len(result[-1]) + 1) * longest > BATCH_TOKENS:
            result.append([])
        result[-1].append(item)
    return result


@torch.no_grad()
def token_nats(
    model: torch.nn.Module, documents: Sequence[NDArray[np.int64]], *, context: int, label: str = ""
) -> list[NDArray[np.float64]]:
    """Negative log-likelihood in nats of every token after the first, one array a document (its length less one)."""
    result = [np.zeros(len(d) - 1) for d in documents]
    todo = windows([len(d) for d in documents], context)
    with tqdm(total=sum(w.end - w.start for w in todo), desc=label, unit="token", mininterval=5) as progress:
        for batch in batches(todo):
            # Padding on the right needs no mask: no token before it attends to it.
            ids = torch.zeros(len(batch), batch[0].end - batch[0].start, dtype=torch.int64)
            for row, w in enumerate(batch):
                ids[row, : w.end - w.start] = torch.from_numpy(documents[w.document][w.start : w.end])
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").numpy()
            for row, w in enumerate(batch):
                result[w.document][w.first - 1 : w.end - 1] = nats[row, w.first - 1 - w.start : w.end - 1 - w.start]
                progress.update(w.end - w.start)
    return result
