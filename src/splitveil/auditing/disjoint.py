"""No attacker learns from its victims: shadow text shares neither a whole text nor a long run of words with them.

A run of ``RUN`` words is what n-gram checks of training data against test data usually take (13 words in Brown et al.,
*Language Models are Few-Shot Learners*, 2020, appendix C); shorter runs are the phrases that people share.
"""

import re
from collections.abc import Iterator, Sequence

from splitveil.errors import DataError

RUN = 12
"""Words in a row that victims and shadow text must not share."""
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Thai, Lao, Burmese, Khmer, kana and Chinese characters: scripts that put no spaces between words."""
_WORD = re.compile(rf"[^\W{_UNSPACED}]+|[^\W]")


def words(text: str) -> list[str]:
    """Lower-case words, without punctuation; of scripts without spaces between words, characters."""
    return _WORD.findall(text.casefold())


def runs(text: str) -> Iterator[tuple[str, ...]]:
    """Every run of ``RUN`` words, and the whole text where it is shorter than that (marked as whole)."""
    found = words(text)
    if len(found) < RUN:
        yield ("", *(found or [text.strip()]))  # equal to another whole text only, never to a run inside a longer one
    for start in range(len(found) - RUN + 1):
        yield tuple(found[start : start + RUN])


class Victims:
    """The victims' runs of words, to be looked up."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._where: dict[tuple[str, ...], int] = {}
        for index, text in enumerate(texts):
            for run in runs(text):
                self._where.setdefault(run, index)

    def shares(self, text: str) -> int | None:
        """Number of a victim that shares a whole text or a run of words with ``text``."""
        return next((self._where[run] for run in runs(text) if run in self._where), None)


def check_disjoint(victims: Sequence[str], shadow: Sequence[str]) -> None:
    """Raises ``DataError`` where a shadow text overlaps with a victim, with their numbers and not their content."""
    known = Victims(victims)
    found = [(number, victim) for number, text in enumerate(shadow) if (victim := known.shares(text)) is not None]
    if found:
        number, victim = found[0]
        raise DataError(
            f"the shadow text overlaps with the victims in {len(found)} of its {len(shadow)} texts: text {number} and "
            f"prompt {victim} are equal or share {RUN} words in a row (both counted from 0, empty ones not counted); "
            "give the attacker other text, or take those out"
        )


def distinct(texts: Sequence[str]) -> list[str]:
    """The texts without those that say the same as an earlier one."""
    first: dict[tuple[str, ...], str] = {}
    for text in texts:
        first.setdefault(tuple(words(text)) or (text,), text)
    return list(first.values())
