"""Every attack reads the plain crossing, and none reads the private layer's encrypted query in its place.

The same attackers with the same effort on both; on the encrypted one they adapt: what they ask the device comes back
encrypted as well, under fresh masks.
"""

import pytest
import torch
from attack_support import Target

from splitveil.attacks.attack import Effort, silent
from splitveil.attacks.catalogue import CONTROLS, create, names
from splitveil.attacks.knowledge import Access
from splitveil.defences.catalogue import create as create_defence
from splitveil.split import Crossing

EFFORT = Effort(seconds=30, steps=30)
# What the blocks after the cut cannot read, they are not trained with: there are no gradients to attack.
ATTACKS = [name for name in names() if name not in CONTROLS and Access.CLOUD not in create(name).needs]
# One vector for a whole text tells little on so small a budget; it is compared on trained models by the benchmark.
READS = {"pooled": 0.01, "mlp": 0.3}
# Of 336 scored tokens, more than this many right by chance happens once in ten thousand runs of one attack.
AT_MOST = 10 / 336


@pytest.fixture(scope="module")
def plain() -> Target:
    return Target()


@pytest.fixture(scope="module")
def encrypted() -> Target:
    return Target(protect=create_defence("encrypted").protect)


@pytest.mark.parametrize("name", ATTACKS)
def test_it_reads_the_plain_crossing_and_not_the_encrypted_one(plain: Target, encrypted: Target, name: str) -> None:
    scores = []
    for target in (plain, encrypted):
        attack = create(name)
        attack.fit(target.knowledge().restricted(attack.needs), EFFORT, silent)
        scores.append(target.accuracy(attack.recover(target.crossing, silent).tokens))
    assert scores[0] > READS.get(name, 0.8)
    assert scores[1] <= AT_MOST


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

    target = Target(protect=unmasked)
    assert target.crossing.width == width + 1024
    attack = create("ridge")
    attack.fit(target.knowledge().restricted(attack.needs), EFFORT, silent)
    assert target.accuracy(attack.recover(target.crossing, silent).tokens) > 0.6
