"""Shadow text and victims have nothing in common; errors say which, and not what."""

import pytest

from splitveil.auditing.disjoint import RUN, check_disjoint, distinct
from splitveil.errors import DataError

VICTIMS = ["Short one.", "a b c d e f g h i j k l m n o p"]
LETTERS = VICTIMS[1].split()


def test_text_without_overlap_passes() -> None:
    check_disjoint(VICTIMS, ["something else", "short", "short one and more", " ".join(LETTERS[: RUN - 1])])


@pytest.mark.parametrize(
    ("shadow", "victim"),
    [
        ("short ONE", 0),
        (" ".join(LETTERS), 1),
        (" ".join(LETTERS).upper().replace(" ", ", "), 1),
        ("before " + " ".join(LETTERS[:RUN]) + " after", 1),
        ("before " + " ".join(LETTERS[-RUN:]), 1),
    ],
)
def test_overlap_is_refused(shadow: str, victim: int) -> None:
    with pytest.raises(DataError) as caught:
        check_disjoint(VICTIMS, ["fine", shadow, "fine too"])
    assert f"1 of its 3 texts: text 1 and prompt {victim} " in str(caught.value)
    assert shadow not in str(caught.value)


def test_equal_documents_count_once() -> None:
    assert distinct(["A b.", "c", "a B", "!", "?", "!"]) == ["A b.", "c", "!", "?"]
