"""benchmarks/stages.py: the parts of an attack are its parts, and the beam search finds what there is to find."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_support import Target

from splitveil.attacks.attack import Effort, silent
from splitveil.attacks.catalogue import create

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def stages() -> Iterator[Any]:
    """The benchmark, importable as its own command imports what it needs."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("stages")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def target() -> Target:
    return Target()


def fitted(target: Target, name: str, steps: int) -> Any:
    attack = create(name)
    attack.fit(target.knowledge().restricted(attack.needs), Effort(seconds=60, steps=steps), silent)
    return attack


def test_the_parts_of_an_attack(stages: Any, target: Target) -> None:
    attack = fitted(target, "revert", 15)
    found = stages.readings(attack.net, target.crossing)
    text = target.crossing.text
    assert len(found) == 5
    assert torch.equal(found[stages.WHOLE][text], attack.recover(target.crossing, silent).tokens[text])
    scores = {name: target.accuracy(tokens) for name, tokens in found.items()}
    assert scores["stage 1, its own head"] > 0.8  # it begins as ridge regression
    assert scores["stage 1, nearest embedding"] > 0.8
