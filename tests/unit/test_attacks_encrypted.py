"""Every attack reads the plain crossing, and none reads the private layer's encrypted query in its place.

The same attackers with the same effort on both; on the encrypted one they adapt: what they ask the device comes back
encrypted as well, under fresh masks.
"""

import pytest
import torch
from attack_support import LONGER, SHORT, Target

from splitveil.attacks.attack import BuiltOn, Effort, learner_of, silent
from splitveil.attacks.catalogue import CONTROLS, create, names
from splitveil.defences.catalogue import create as create_defence
from splitveil.split import Crossing

EFFORT = Effort(seconds=60, steps=20)
# Half the usual length: encrypting what attackers ask takes most of the time.
LENGTH = 8
# What the blocks after the cut cannot read, they are not trained with: there are no gradients to attack. ``pooled`` has
# a test of its own, on texts that are short enough for it.
ATTACKS = [name for name in names() if name not in {*CONTROLS, "gradient", "pooled"}]
READS = {"mlp": 0.3}
# Of 336 scored tokens, or the 320 of short texts, a larger share right by chance happens less than once in ten thousand
# runs of one attack.
AT_MOST = 10 / 336


@pytest.fixture(scope="module")
def plain() -> Target:
    return Target(length=LENGTH)


@pytest.fixture(scope="module")
def encrypted() -> Target:
    return Target(length=LENGTH, protect=create_defence("encrypted").protect)


LEARNT: dict[tuple[Target, str], dict[str, torch.Tensor]] = {}
"""By target and attack: what two attacks learn alike is learnt once, as in an audit."""


def score(name: str, target: Target, effort: Effort) -> float:
    attack = create(name)
    known, learner = target.knowledge().restricted(attack.needs), learner_of(attack)
    place = (target, learner.name)
    if place in LEARNT:
        learner.restore(LEARNT[place], known)
    else:
        learner.fit(known, effort, silent)
        LEARNT[place] = learner.state()
    if isinstance(attack, BuiltOn):
        attack.prepare(known)
    return target.accuracy(attack.recover(target.crossing, silent).tokens)


@pytest.mark.parametrize("name", ATTACKS)
def test_it_reads_the_plain_crossing_and_not_the_encrypted_one(plain: Target, encrypted: Target, name: str) -> None:
    assert score(name, plain, EFFORT) > READS.get(name, 0.8)
    assert score(name, encrypted, EFFORT) <= AT_MOST


def test_pooled_reads_short_texts_and_not_their_encrypted_queries() -> None:
    assert score("pooled", Target(**SHORT), LONGER) > 0.2
    assert score("pooled", Target(**SHORT, protect=create_defence("encrypted").protect), LONGER) <= AT_MOST


def test_the_search_is_certain_of_the_plain_crossing_only(plain: Target, encrypted: Target) -> None:
    sure = []
    for target in (plain, encrypted):
        attack = create("search")
        attack.fit(target.knowledge().restricted(attack.needs), EFFORT, silent)
        sure.append(attack.recover(target.crossing, silent).facts["certified"].nanmean().item())
    assert sure == [1.0, 0.0]


def test_without_the_mask_the_same_crossing_is_read(plain: Target) -> None:
    """The protection removed: the query's words scaled in the same way but not masked are as good as plain ones."""
    width = plain.crossing.width

    def unmasked(crossing: Crossing) -> Crossing:
        scaled = crossing.hidden / crossing.hidden.norm(dim=-1, keepdim=True).clamp(min=1e-9) / 2
        pad = torch.rand(*scaled.shape[:2], 1024) - 0.5
        return crossing.with_hidden(torch.cat([scaled, pad], -1))

    target = Target(length=LENGTH, protect=unmasked)
    assert target.crossing.width == width + 1024
    attack = create("ridge")
    attack.fit(target.knowledge().restricted(attack.needs), EFFORT, silent)
    assert target.accuracy(attack.recover(target.crossing, silent).tokens) > 0.6
