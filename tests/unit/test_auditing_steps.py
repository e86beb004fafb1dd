"""An audit whose attackers learn in steps: how many they take, that the file knows, and what is refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from auditing_support import SHADOW, VICTIMS, Fake, create_attack, create_defence, tiny_model, tiny_tokenizer

from splitveil.attacks.attack import Effort, Progress
from splitveil.attacks.knowledge import Knowledge
from splitveil.auditing.audit import audit
from splitveil.auditing.outcome import Report
from splitveil.errors import ConfigurationError

MODEL, TOKENIZER = tiny_model(), tiny_tokenizer()


class Told(Fake):
    """Remembers how much it was allowed to learn."""

    name = "told"
    efforts: ClassVar[list[Effort]] = []

    def fit(self, knowledge: Knowledge, effort: Effort, progress: Progress) -> None:
        self.efforts.append(effort)
        super().fit(knowledge, effort, progress)


@pytest.fixture
def efforts() -> Iterator[list[Effort]]:
    Told.efforts.clear()
    yield Told.efforts
    Told.efforts.clear()


def run(out: Path | None = None, **changes: Any) -> Report:
    return audit(
        MODEL,
        TOKENIZER,
        VICTIMS,
        SHADOW,
        cuts=(0,),
        attacks=("told",),
        tokens=12,
        windows=20,
        out=out,
        create_attack=lambda name: Told() if name == "told" else create_attack(name),
        create_defence=create_defence,
        **changes,
    )


def test_attacks_are_told_how_many_steps_and_the_report_says_so(efforts: list[Effort]) -> None:
    report = run(steps=7, budget=1e6)
    assert [(one.steps, one.seconds) for one in efforts] == [(7, 1e6)]
    assert report.meta["budget_steps"] == 7


def test_without_steps_only_the_clock_counts(efforts: list[Effort]) -> None:
    report = run()
    assert [one.steps for one in efforts] == [None]
    assert "budget_steps" not in report.meta


def test_another_number_of_steps_is_another_attacker(tmp_path: Path, efforts: list[Effort]) -> None:
    for steps, learnt in ((7, 1), (7, 1), (8, 2), (None, 3), (8, 3)):
        run(tmp_path, steps=steps)
        assert len(efforts) == learnt, f"after {steps} steps"


@pytest.mark.parametrize("steps", [0, -1])
def test_no_step_is_no_learning(steps: int, efforts: list[Effort]) -> None:
    with pytest.raises(ConfigurationError, match=f"one step at least, got {steps}"):
        run(steps=steps)
    assert not efforts
