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


CHINESE = "我的膝盖在爬楼梯的时候很疼，医生说要休息几天再回来复查。"
THAI = "เข่าของฉันเจ็บเวลาเดินขึ้นบันไดทุกวันและหมอบอกให้พัก"


@pytest.mark.parametrize("victim", [CHINESE, THAI])
def test_scripts_without_spaces_between_words(victim: str) -> None:
    with pytest.raises(DataError, match="share 12 words"):
        check_disjoint([victim], [victim[:3] + victim])
    with pytest.raises(DataError, match="share 12 words"):
        check_disjoint([victim], ["before " + victim[4:] + " after"])
    check_disjoint([victim], [victim[:8], "something else"])


def test_texts_of_punctuation_alone_are_told_apart() -> None:
    check_disjoint(["!!!"], ["???"])
    with pytest.raises(DataError):
        check_disjoint(["!!!"], ["???", " !!! "])
