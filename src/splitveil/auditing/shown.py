"""Side by side: what a prompt was and what an attack made of it, token by token, for the report."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from splitveil.auditing.windows import Victims

PROMPTS = 8
"""Prompts that are kept in the report for each attack; those with personal data first."""


def side_by_side(tokenizer: Any, victims: Victims, tokens: Tensor) -> Iterator[dict[str, Any]]:
    """Some prompts with what an attack recovered as ``tokens`` (prompts, positions), special tokens left out.

    ``correct``, ``personal`` and ``spans`` refer to the tokens of ``original``.
    """
    order = sorted(range(len(victims.tokens)), key=lambda row: (not victims.spans[row], row))
    for row in sorted(order[:PROMPTS]):
        where = victims.scored[row]
        place = (where.cumsum(0) - 1).tolist()
        truth, guess = victims.tokens[row][where], tokens[row][where]
        yield {
            "prompt_index": victims.indices[row],
            "original": pieces(tokenizer, truth.tolist()),
            "recovered": pieces(tokenizer, guess.tolist()),
            "correct": (truth == guess).tolist(),
            "personal": (victims.personal[row][where] > 0).tolist(),
            "spans": [
                {"start": place[span.start], "end": place[span.end - 1] + 1, "type": span.kind}
                for span in victims.spans[row]
            ],
        }


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text, spaces included; a token that is a part of a character stands as it decodes."""
    found, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text.startswith(before):
            found.append(text[len(before) :])
        else:
            found.append(tokenizer.decode([ids[end - 1]], skip_special_tokens=False))
        before = text
    return found
