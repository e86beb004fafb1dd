"""An attack is handed what it declares, and nothing else."""

import inspect

import pytest
import torch
from attack_support import Target

from splitveil.attacks import catalogue
from splitveil.attacks.attack import Effort, silent
from splitveil.attacks.knowledge import Access
from splitveil.errors import ConfigurationError, NonFiniteError, UndeclaredKnowledgeError

PROPERTIES = {
    Access.QUERIES: "oracle",
    Access.WEIGHTS: "white_box",
    Access.HEAD: "head",
    Access.CLOUD: "cloud",
    Access.SHADOW: "shadow",
    Access.EMBEDDINGS: "embeddings",
    Access.PRIOR: "prior",
    Access.TRUTH: "truth",
}


@pytest.fixture(scope="module")
def target() -> Target:
    return Target()


@pytest.mark.parametrize("access", list(Access))
def test_what_was_not_declared_raises(target: Target, access: Access) -> None:
    everything = target.knowledge()
    assert getattr(everything, PROPERTIES[access]) is not None
    without = everything.restricted(frozenset(Access) - {access})
    with pytest.raises(UndeclaredKnowledgeError, match=access.value):
        getattr(without, PROPERTIES[access])


def test_no_attacker_is_given_what_it_does_not_have(target: Target) -> None:
    poor = target.knowledge().restricted(frozenset({Access.QUERIES}))
    with pytest.raises(UndeclaredKnowledgeError, match="shadow text"):
        poor.restricted(frozenset({Access.QUERIES, Access.SHADOW}))


def test_only_the_control_is_told_the_prompts() -> None:
    told = [name for name in catalogue.names() if Access.TRUTH in catalogue.create(name).needs]
    assert told == ["oracle"]


@pytest.mark.parametrize("name", catalogue.names())
def test_an_attack_holds_what_it_declares_and_nothing_else(target: Target, name: str) -> None:
    """Not even under the names that Python calls private."""
    needs = catalogue.create(name).needs
    known = target.knowledge().restricted(needs)
    for access, public in PROPERTIES.items():
        assert (getattr(known, f"_{public}") is not None) is (access in needs)
        if access not in needs:
            with pytest.raises(UndeclaredKnowledgeError, match=access.value):
                getattr(known, public)
    assert (known._truth is None) is (name != "oracle")


@pytest.mark.parametrize("name", catalogue.names())
def test_every_attack_declares_itself_and_sees_a_crossing_only(name: str) -> None:
    attack = catalogue.create(name)
    assert attack.name == name
    assert attack.version >= 1
    assert attack.source
    assert attack.summary
    assert list(inspect.signature(attack.recover).parameters) == ["crossing", "progress"]


@pytest.mark.parametrize("name", [n for n in catalogue.names() if n != "oracle"])
def test_no_attack_asks_for_more_than_it_declares(target: Target, name: str) -> None:
    """Learning and recovery work with the restricted knowledge."""
    attack = catalogue.create(name)
    attack.fit(target.knowledge().restricted(attack.needs), Effort(seconds=30, steps=2), silent)
    found = attack.recover(target.training, silent)
    assert found.tokens.shape == target.victims.shape
    assert torch.equal(found.tokens >= 0, target.victims >= 0)


def test_the_oracle_counts(target: Target) -> None:
    oracle = target.knowledge().oracle
    oracle(target.shadow.train[:3])
    oracle(torch.zeros(2, 5, dtype=torch.long), torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]))
    assert oracle.sequences == 5
    assert oracle.tokens == target.shadow.train[:3].numel() + 8


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_state_that_is_no_number_is_no_answer(wrong: float) -> None:
    broken = Target(
        protect=lambda crossing: crossing.with_hidden(crossing.hidden.index_fill(1, torch.tensor(5), wrong))
    )
    oracle, texts = broken.knowledge().oracle, broken.shadow.train[:3]
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        oracle(texts)
    oracle(texts, (torch.arange(16) < 5).long().expand(3, -1))  # what is there without a text is nobody's


def test_an_unknown_attack_is_refused_with_the_names() -> None:
    with pytest.raises(ConfigurationError, match=r"'revrt'.*revert"):
        catalogue.create("revrt")
