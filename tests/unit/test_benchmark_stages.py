"""benchmarks/stages.py: the parts of an attack are its parts, and the beam search finds what there is to find."""

import importlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_support import VOCABULARY, Target

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
    found = stages.readings(attack._net, target.crossing)
    text = target.crossing.text
    assert len(found) == 5
    assert torch.equal(found[stages.WHOLE][text], attack.recover(target.crossing, silent).tokens[text])
    scores = {name: target.accuracy(tokens) for name, tokens in found.items()}
    assert scores["stage 1, its own head"] > 0.8  # it begins as ridge regression
    assert scores["stage 1, nearest embedding"] > 0.8


def test_without_a_prior_the_search_says_what_was_read(stages: Any, target: Target) -> None:
    attack = fitted(target, "mlp", 15)
    with torch.no_grad():
        scores = attack._net(target.crossing.hidden).log_softmax(-1)
    text = target.crossing.text
    found = stages.beam_search(target.model, scores, text, 0.0)
    assert torch.equal(found[text], scores.argmax(-1)[text])


def test_the_search_finds_the_likeliest_text(stages: Any, target: Target) -> None:
    """With room for all of them, the best of all texts of three candidates a position; what comes after the end of a
    text has no say.
    """
    scores = torch.randn(2, 4, VOCABULARY, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    text = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    found = stages.beam_search(target.model, scores, text, 3.0, candidates=3, beams=81)
    for row, length in ((0, 4), (1, 3)):
        every = torch.tensor(list(itertools.product(*scores[row, :length].topk(3).indices.tolist())))
        with torch.no_grad():
            likely = target.model(every).logits.log_softmax(-1)[:, :-1].gather(2, every[:, 1:, None]).sum((1, 2))
        read = scores[row, :length].gather(1, every.T).sum(0)
        assert torch.equal(found[row, :length], every[(read + 3.0 * likely).argmax()])
        assert not torch.equal(found[row, :length], every[read.argmax()])
