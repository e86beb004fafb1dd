"""Texts as token ids: the victims' first tokens with what is scored in them, shadow text in windows of one length.

Prompts are tokenised as a user's would be, with the special tokens that the tokenizer adds. Those cross, and are not
scored: everyone knows them beforehand.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from splitveil.auditing.data import Text
from splitveil.errors import BaseModelError, ConfigurationError, DataError


@dataclass(frozen=True)
class TokenSpan:
    """Personal data in a prompt: the tokens from ``start`` up to ``end``."""

    start: int
    end: int
    kind: str


@dataclass(frozen=True, repr=False)
class Victims:
    """The prompts that are attacked, padded on the right."""

    tokens: Tensor
    """(prompts, positions) token ids, -1 for padding."""
    scored: Tensor
    """(prompts, positions) of bool: text that the user wrote, so neither padding nor special tokens."""
    personal: Tensor
    """(prompts, positions): characters of marked personal data in each token."""
    spans: tuple[tuple[TokenSpan, ...], ...]
    """By prompt. Only personal data that crosses as a whole, with nothing of it after the last token."""
    indices: tuple[int, ...]
    """By prompt: its number among the texts given."""
    marked: bool
    """Whether the data marks personal data at all, and the tokenizer tells where its tokens are."""
    shortened: int
    """How many of the prompts were longer."""

    @property
    def mask(self) -> Tensor:
        """(prompts, positions) of 0 and 1: 1 where there is text."""
        return (self.tokens >= 0).long()


@dataclass(frozen=True)
class _Encoded:
    ids: list[int]
    special: list[bool]
    offsets: list[tuple[int, int]] | None


def take_victims(tokenizer: Any, texts: Sequence[Text], *, prompts: int, tokens: int, seed: int) -> Victims:
    """The first ``tokens`` tokens of ``prompts`` of the texts: all of them, or a random sample in their order.

    Raises ``DataError`` where no text has a token that can be scored.
    """
    draw = torch.Generator().manual_seed(seed)
    encoded, indices, shortened = [], [], 0
    for index in torch.randperm(len(texts), generator=draw).tolist():
        found = encode(tokenizer, texts[index].text)
        cut = _Encoded(found.ids[:tokens], found.special[:tokens], found.offsets and found.offsets[:tokens])
        if not all(cut.special):
            encoded.append(cut)
            indices.append(index)
            shortened += len(found.ids) > tokens
        if len(encoded) == prompts:
            break
    if not encoded:
        raise DataError(f"no prompt has a token of its own among its first {tokens}; give more --tokens")
    order = sorted(range(len(indices)), key=indices.__getitem__)
    encoded, indices = [encoded[i] for i in order], [indices[i] for i in order]

    length = max(len(one.ids) for one in encoded)
    ids = torch.full((len(encoded), length), -1)
    scored = torch.zeros(len(encoded), length, dtype=torch.bool)
    personal = torch.zeros(len(encoded), length, dtype=torch.long)
    spans = []
    for row, (one, index) in enumerate(zip(encoded, indices, strict=True)):
        ids[row, : len(one.ids)] = torch.tensor(one.ids)
        scored[row, : len(one.ids)] = ~torch.tensor(one.special)
        spans.append(tuple(_token_spans(one, texts[index], personal[row])))
    marked = any(text.spans for text in texts) and all(one.offsets is not None for one in encoded)
    return Victims(ids, scored, personal * scored, tuple(spans), tuple(indices), marked, shortened)


def encode(tokenizer: Any, text: str) -> _Encoded:
    """Token ids of a text with the tokenizer's own special tokens, and where each token is in the text."""
    found = tokenizer(
        text, return_special_tokens_mask=True, return_offsets_mapping=bool(tokenizer.is_fast), verbose=False
    )
    offsets = [(int(a), int(b)) for a, b in found["offset_mapping"]] if "offset_mapping" in found else None
    return _Encoded(list(found["input_ids"]), [bool(flag) for flag in found["special_tokens_mask"]], offsets)


def prefix(tokenizer: Any) -> list[int]:
    """The special tokens that every prompt begins with."""
    found = encode(tokenizer, "a")
    length = next((i for i, special in enumerate(found.special) if not special), len(found.special))
    return found.ids[:length]


def check_length(model: Any, tokenizer: Any, tokens: int) -> None:
    """Raises ``DataError`` where prompts of ``tokens`` tokens do not fit into the model's context."""
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context is not None and tokens > context:
        raise DataError(
            f"prompts of {tokens} tokens are longer than the model's context of {context}; give --tokens {context}, "
            "or fewer"
        )
    shortest = len(prefix(tokenizer)) + 1
    if tokens < shortest:
        raise ConfigurationError(f"prompts of {tokens} tokens leave nothing to score; the least is {shortest}")


def check_vocabulary(model: Any, tokens: Tensor) -> None:
    """Raises ``BaseModelError`` where token ids are not the model's: the tokenizer is another model's."""
    vocabulary, largest = model.get_input_embeddings().weight.shape[0], int(tokens.max())
    if largest >= vocabulary:
        raise BaseModelError(
            f"the tokenizer gives token {largest}, and the model has {vocabulary} tokens; they do not belong together"
        )


def cut_windows(tokenizer: Any, texts: Sequence[str], *, tokens: int, limit: int) -> Tensor:
    """(windows, ``tokens``) token ids, at most ``limit`` windows, all different.

    Windows begin where a text begins, as prompts do, as long as the text lasts; what is left of the texts is joined
    and cut too. Every window begins with the tokenizer's own special tokens.
    """
    begin = prefix(tokenizer)
    size = tokens - len(begin)
    rest: list[int] = []
    found: dict[tuple[int, ...], None] = {}
    for text in texts:
        one = encode(tokenizer, text)
        ids = [token for token, special in zip(one.ids, one.special, strict=True) if not special]
        whole = len(ids) // size * size
        rest += ids[whole:]
        spare = len(rest) // size * size
        for window in (*_pieces(ids[:whole], size), *_pieces(rest[:spare], size)):
            found[window] = None
        rest = rest[spare:]
        if len(found) >= limit:
            break
    rows = list(found)[:limit]
    return torch.tensor([[*begin, *row] for row in rows], dtype=torch.long).reshape(len(rows), tokens)


def _pieces(ids: list[int], size: int) -> Iterator[tuple[int, ...]]:
    return (tuple(ids[start : start + size]) for start in range(0, len(ids), size))


def _token_spans(one: _Encoded, text: Text, personal: Tensor) -> Iterator[TokenSpan]:
    """The spans that cross as a whole; the characters of all spans are counted in ``personal``."""
    if one.offsets is None:
        return
    reach = max((end for _, end in one.offsets), default=0)
    covered = {place for span in text.spans for place in range(span.start, span.end)}  # spans may overlap
    for token, (start, end) in enumerate(one.offsets):
        personal[token] = sum(place in covered for place in range(start, end))
    for span in text.spans:
        inside = [i for i, (start, end) in enumerate(one.offsets) if start < span.end and span.start < end]
        if inside and span.end <= reach:
            yield TokenSpan(inside[0], inside[-1] + 1, span.kind)
