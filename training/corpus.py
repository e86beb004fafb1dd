"""The training text: which sets, how a row becomes a document, and what is held out.

A document is one string. Held-out documents are chosen by a hash of their text, so every script that asks for the
same set gets the same split, on every machine and in every run.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

# Permissive sets only (CC BY, CC0, public domain, MIT); each one's licence and commit are in its SOURCE.txt.
# Left out on purpose: medquad (the adapter's own domain, which the base must never see), mts_dialog (the audit's
# victims) and sgd (share-alike).
BASE_SETS = (
    "child_stories",
    "childrens_classics",
    "gov_18f",
    "gov_digitalgov",
    "gov_plainlanguage",
    "gsm8k_train",
    "legal_cuad_qa",
    "legal_site_policy",
    "openstax_american_government",
    "openstax_anatomy_physiology",
    "openstax_anthropology",
    "openstax_astronomy",
    "openstax_business",
    "openstax_college_success",
    "openstax_microbiology",
    "openstax_philosophy",
    "openstax_principles_economics",
    "openstax_psychology",
    "openstax_sociology",
    "openstax_us_history",
    "taskmaster",
)
CLINIC_SET = "medquad"
HELD_OUT_SHARE = 0.04
ANSWER_KEY_WORDS = 12


def rows(text_dir: Path, name: str) -> Iterator[dict[str, str | list[str]]]:
    """Every row of one set, in file order."""
    files = sorted((text_dir / name).glob("*.jsonl"))
    if not files:
        raise FileNotFoundError(f"no .jsonl file under {text_dir / name}: give the folder that holds the text sets")
    for file in files:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)


def dialogue(question: str, answer: str = "") -> str:
    """The question-and-answer form shared by the base's training, the adapter's training and the demo."""
    return f"Question: {question.strip()}\nAnswer: {answer.strip()}".rstrip()


def document(row: dict[str, str | list[str]]) -> str:
    """One row as plain text."""
    if "question" in row:
        return dialogue(str(row["question"]), str(row["answer"]))
    if "turns" in row:
        return "\n".join(row["turns"])
    return str(row["text"]).strip()


def share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def base_documents(text_dir: Path, *, held_out: bool, sets: tuple[str, ...] = BASE_SETS) -> list[str]:
    """Documents of the base model's sets: the training part, or the held-out part."""
    kept = []
    for name in sets:
        for row in rows(text_dir, name):
            text = document(row)
            if (share(text) < HELD_OUT_SHARE) == held_out:
                kept.append(text)
    return kept


def clinic_pairs(text_dir: Path, *, held_out: bool) -> list[tuple[str, str]]:
    """(question, answer) pairs of the clinic set, split by question *and* by the answer's first words.

    Many rows share a question, and many questions share an answer's beginning (one disease under several names).
    Rows joined by either are one group, and a group is held out as a whole: no held-out row has its question, or
    the first ``ANSWER_KEY_WORDS`` words of its answer, in the training part.
    """
    pairs = [(str(r["question"]), str(r["answer"])) for r in rows(text_dir, CLINIC_SET)]
    parent = list(range(len(pairs)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[tuple[str, str], int] = {}
    for i, (question, answer) in enumerate(pairs):
        for key in (
            ("question", " ".join(question.lower().split())),
            ("answer", " ".join(answer.lower().split()[:ANSWER_KEY_WORDS])),
        ):
            parent[root(i)] = root(first.setdefault(key, i))
    smallest: dict[int, str] = {}
    for i, (question, _) in enumerate(pairs):
        smallest[root(i)] = min(smallest.get(root(i), question), question)
    return [p for i, p in enumerate(pairs) if (share(smallest[root(i)]) < HELD_OUT_SHARE) == held_out]
