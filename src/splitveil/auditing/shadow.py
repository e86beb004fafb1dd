"""The attacker's own text: given in a file, or sampled from the model itself. Never from the victims' file."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from splitveil.attacks.knowledge import Shadow
from splitveil.auditing.disjoint import Victims, check_disjoint, distinct
from splitveil.auditing.windows import cut_windows, prefix
from splitveil.errors import DataError

VALIDATION = 0.1
"""Share of the documents, and of the windows, that attackers keep for early stopping."""
BATCH = 64


def given_shadow(
    tokenizer: Any, texts: Sequence[str], victims: Sequence[str], *, tokens: int, windows: int, seed: int
) -> Shadow:
    """Shadow text as at most ``windows`` windows of ``tokens`` tokens to learn from, and a tenth to validate.

    Texts go to one or the other as a whole, after those that say the same were reduced to one.
    Raises ``DataError`` where they overlap with the victims, or are too few.
    """
    check_disjoint(victims, texts)
    documents = distinct(texts)
    if len(documents) < 2:
        raise DataError("the shadow text is one document; it takes two or more, one of them for validation")
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    kept = max(1, round(VALIDATION * len(documents)))
    parts = [documents[i] for i in order[kept:]], [documents[i] for i in order[:kept]]
    limits = windows, max(1, round(VALIDATION * windows))
    train, validation = (
        cut_windows(tokenizer, part, tokens=tokens, limit=limit) for part, limit in zip(parts, limits, strict=True)
    )
    return _checked(train, validation, "given")


def sampled_shadow(
    model: Any,
    tokenizer: Any,
    victims: Sequence[str],
    *,
    tokens: int,
    windows: int,
    seed: int,
    progress: Callable[[float], None],
) -> Shadow:
    """Half of the windows sampled from the model itself, half of uniformly random tokens.

    Sampled ones that overlap with a victim, as a model that knows its users' texts by heart would write them, are
    left out.
    """
    count = windows + max(2, round(VALIDATION * windows))
    written = _sample(model, prefix(tokenizer), tokens, (count + 1) // 2, seed, progress)
    known = Victims(victims)
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    written = written[[known.shares(text) is None for text in texts]]
    draw = torch.Generator().manual_seed(seed)
    begin = torch.tensor(prefix(tokenizer), dtype=torch.long).expand(count // 2, -1)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    noise = torch.randint(vocabulary, (count // 2, tokens - begin.shape[1]), generator=draw)
    noise = torch.cat([begin, noise], 1)
    parts = [torch.split(part, [len(part) - (kept := max(1, len(part) // 11)), kept]) for part in (written, noise)]
    train, validation = (torch.cat(part) for part in zip(*parts, strict=True))
    return _checked(train, validation, "sampled from the model itself, and uniformly random tokens")


def _sample(
    model: Any, begin: Sequence[int], tokens: int, count: int, seed: int, progress: Callable[[float], None]
) -> Tensor:
    """(count, tokens) ids drawn from the model at temperature 1."""
    found: list[Tensor] = []
    vocabulary = model.get_input_embeddings().weight.shape[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, count, BATCH):
            rows = min(BATCH, count - start)
            first = (
                torch.tensor(begin, dtype=torch.long).expand(rows, -1)
                if begin
                else torch.randint(vocabulary, (rows, 1))
            )
            ids = first.to(model.device)
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=tokens - ids.shape[1],
                max_new_tokens=tokens - ids.shape[1],
                pad_token_id=0,
            )
            found.append(output.cpu())
            progress(len(found) * BATCH / count)
    return torch.cat(found)


def _checked(train: Tensor, validation: Tensor, origin: str) -> Shadow:
    """Raises ``DataError`` unless both parts have windows and none in common."""
    common = {tuple(row) for row in validation.tolist()}
    train = train[[tuple(row) not in common for row in train.tolist()]]
    if not len(train) or not len(validation):
        raise DataError(
            f"the shadow text makes {len(train)} windows to learn from and {len(validation)} to validate; it takes at "
            "least one of each: give more text, or fewer --tokens"
        )
    return Shadow(train, validation, origin)
