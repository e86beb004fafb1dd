"""The first screen: what leaks, where, to whom, and what to do, in plain words computed from the rows."""

from collections.abc import Mapping
from dataclasses import dataclass

from splitveil.report.measurements import NONE, Cell, Measurements, Setting
from splitveil.report.meta import AttackInfo, Meta
from splitveil.report.numbers import THIN, in_prose, listed
from splitveil.report.standing import Judgement, Standing, against_floor, defended

READABLE, MOSTLY, PARTLY = 0.9, 0.5, 0.1
USELESS = 0.5
"""A defence that leaves the best attack this share of the tokens is named as no help."""

# What an attacker has beside the crossing, the most first; words as attacks declare their needs.
TIERS = (
    ("the device half's weights", "with the device half’s weights (everyone, if the base model is public)"),
    ("queries to the device half", "who can run texts of their own through the device half"),
    ("the output head", "with the model’s output head"),
    ("", "who sees what crosses and nothing else"),
)


@dataclass(frozen=True)
class Answer:
    """One of the four questions, and one or more sentences."""

    question: str
    sentences: list[str]


@dataclass(frozen=True)
class Verdict:
    """``level``: "leak", "some", "quiet" (nothing found) or "void" (nothing may be concluded)."""

    level: str
    headline: str
    lead: str
    answers: list[Answer]


@dataclass(frozen=True)
class Best:
    """The best attack on the unprotected crossing at one cut."""

    setting: Setting
    cut: int
    attack: str
    cell: Cell
    leaks: bool


def verdict(m: Measurements, meta: Meta, invalid: list[str]) -> Verdict:
    """What the rows say. Nothing is concluded from an invalid report."""
    if invalid:
        return Verdict("void", "Nothing can be concluded from this report.", "The reasons stand above.", [])
    found = [
        Best(s, cut, *best[0], against_floor(best[0][1], m.floor(s, cut)).standing is Standing.ABOVE)
        for s in m.settings
        for cut in m.cuts(s)
        if (best := m.ranked(s, cut))
    ]
    if not found:
        text = "No attack on the unprotected crossing has a result, so nothing is known about what it gives away."
        return Verdict("void", "Nothing was measured.", text, [])
    top = max(found, key=lambda b: b.cell.value)
    level, headline = _headline(found, top)
    advice = _advice(m, found)
    answers = [
        Answer("What leaks", _what(m, found)),
        Answer("Where", _where(found, meta)),
        Answer("To whom", _whom(m, meta.attacks)),
        Answer("What to do", advice),
    ]
    return Verdict(level, headline, f"{_lead(top, meta.attacks)} {advice[0]}", answers)


def block(cut: int) -> str:
    """Where a cut is, as a phrase."""
    return f"after block {cut}" if cut else "after the embeddings"


def _headline(found: list[Best], top: Best) -> tuple[str, str]:
    if not top.leaks:
        return "quiet", "No attack of this audit beats guessing."
    cuts = len({(b.setting, b.cut) for b in found})
    readable = sum(b.cell.value >= READABLE for b in found)
    if readable == cuts:
        return "leak", "Whoever receives what crosses can read the text" + (", at every cut." if cuts > 1 else ".")
    if readable:
        return "leak", "Whoever receives what crosses can read the text, at the earlier cuts almost word for word."
    if top.cell.value >= MOSTLY:
        return "leak", "Whoever receives what crosses can read most of the text."
    if top.cell.value >= PARTLY:
        return "some", "Whoever receives what crosses can read part of the text."
    return "some", "What crosses gives away a little of the text."


def _lead(top: Best, attacks: Mapping[str, AttackInfo]) -> str:
    """What leaks, where and to whom, in one sentence: on a small screen the answers come later."""
    share, whom = in_prose(top.cell.value), ""
    if top.leaks and top.attack in attacks:
        tier = _tier(attacks[top.attack].needs)
        whom = " by anyone " + next(words for need, words in TIERS if need == tier).partition(" (")[0]
    where = block(top.cut).capitalize()
    return f"{where}, {share} of the tokens of {top.setting.data} are recovered{whom} ({top.attack})."


def _what(m: Measurements, found: list[Best]) -> list[str]:
    sentences = []
    for setting in m.settings:
        mine = [b for b in found if b.setting == setting]
        if not mine:
            continue
        text = f"{_range([b.cell.value for b in mine])} of the tokens of {setting.data}"
        personal = [ranked[0][1].value for b in mine if (ranked := m.ranked(setting, b.cut, metric="personal_recall"))]
        if personal:
            text += f", and {_range(personal)} of its marked personal data"
        sentences.append(text + ".")
    return sentences


def _where(found: list[Best], meta: Meta) -> list[str]:
    cuts = sorted({b.cut for b in found})
    sentences = []
    for cut in cuts:
        best = max((b for b in found if b.cut == cut), key=lambda b: b.cell.value)
        last = ", the last" if cut == meta.blocks else ""
        name = block(cut).capitalize()
        sentences.append(f"{name}{last}: {in_prose(best.cell.value)} ({best.attack}).")
    if len(cuts) > 1:
        deepest = max(b.cell.value for b in found if b.cut == cuts[-1])
        if deepest >= MOSTLY:
            sentences.append("Cutting deeper does not close the leak.")
    return sentences


def _whom(m: Measurements, attacks: Mapping[str, AttackInfo]) -> list[str]:
    sentences = []
    named = [a for a in m.attacks if a in attacks]
    for need, words in TIERS:
        able = [a for a in named if _tier(attacks[a].needs) == need]
        best = [ranked[0] for s in m.settings for cut in m.cuts(s) if (ranked := m.ranked(s, cut, among=able))]
        if best:
            names = listed(list(dict.fromkeys(name for name, _ in best)))
            sentences.append(f"Anyone {words}: {_range([cell.value for _, cell in best])} ({names}).")
    return sentences or ["Whoever receives what crosses; what the attacks need was not recorded."]


def _tier(needs: tuple[str, ...]) -> str:
    return next(need for need, _ in TIERS if need in needs or not need)


def _advice(m: Measurements, found: list[Best]) -> list[str]:
    if not any(b.leaks for b in found):
        return ["Stronger attacks may exist: that none succeeded here is no proof. Add attacks, and more prompts."]
    closed = _closing(m)
    sentences = []
    if closed:
        sentences.append(
            f"Send {_spoken(closed)} instead: with it, every attack that works without is at the floor, no better than "
            "guessing."
        )
    for defence in m.defences:
        if defence == NONE or defence in closed:
            continue
        left = [ranked[0][1].value for s in m.settings for cut in m.cuts(s) if (ranked := m.ranked(s, cut, defence))]
        if not left:
            continue
        if any(j.standing is Standing.ABOVE for j in _judged(m, defence)):
            words = "is no protection" if max(left) >= USELESS else "does not bring every attack to the floor"
            sentences.append(f"{defence} {words}: {_range(left)} are still recovered.")
        else:
            sentences.append(
                f"{defence} leaves {_range(left)}; whether that is the floor cannot be told from this audit."
            )
    if not closed:
        sentences.insert(0, "Do not send this crossing to anyone who must not read the text.")
        if "encrypted" not in m.defences:
            sentences.append("The encrypted query was not measured here: add the defence “encrypted”.")
    return sentences


def _closing(m: Measurements) -> list[str]:
    """Defences that bring every attack to the floor wherever they were tried."""
    out = []
    for defence in m.defences:
        judged = _judged(m, defence) if defence != NONE else []
        if judged and all(j.standing is Standing.FLOOR for j in judged):
            out.append(defence)
    return out


def _judged(m: Measurements, defence: str) -> list[Judgement]:
    """What is said of a defence wherever it was tried."""
    return [
        defended(m, setting, cut, defence)
        for setting in m.settings
        for cut in m.cuts(setting)
        if m.tried(setting, cut, defence)
    ]


def _spoken(defences: list[str]) -> str:
    return listed(["the encrypted query" if name == "encrypted" else name for name in defences])


def _range(values: list[float]) -> str:
    low, high = in_prose(min(values)), in_prose(max(values))
    return low if low == high else f"{low.removesuffix(THIN + '%')} to {high}"
