"""``beam``: the search finds the likeliest text, and a language model helps where states are noisy."""

import itertools
from typing import Any

import pytest
import torch
from attack_support import VOCABULARY, Target

from splitveil.attacks.attack import Effort, learner_of, silent
from splitveil.attacks.beam import WEIGHTS, Beam, Readings, beam_search, best_weight, likeliest, readings
from splitveil.attacks.knowledge import Access, Prior
from splitveil.attacks.revert import Revert
from splitveil.split import Crossing

EFFORT = Effort(seconds=600, steps=20)


@pytest.fixture(scope="module")
def target() -> Target:
    return Target()


@pytest.fixture(scope="module")
def beam(target: Target) -> Beam:
    attack = Beam()
    attack.fit(target.knowledge().restricted(attack.needs), EFFORT, silent)
    return attack


class Chain(Prior):
    """A language in which every word is followed by the next of the vocabulary, nearly always."""

    def __init__(self) -> None:
        pass

    def new_cache(self) -> Any:
        return None

    def __call__(self, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        likely = torch.full((len(tokens), VOCABULARY), 1e-4)
        likely[torch.arange(len(tokens)), (tokens[:, -1] + 1) % VOCABULARY] = 1.0
        return (likely / likely.sum(1, keepdim=True)).log()

    def reorder(self, cache: Any, rows: torch.Tensor) -> None:
        pass


def chains(count: int = 16, length: int = 12) -> torch.Tensor:
    """Texts of that language."""
    start = torch.randint(VOCABULARY, (count, 1), generator=torch.Generator().manual_seed(2))
    return (start + torch.arange(length)) % VOCABULARY


def blurred(tokens: torch.Tensor, noise: float) -> torch.Tensor:
    """Readings of texts, with noise in the scores."""
    scores = 4.0 * torch.nn.functional.one_hot(tokens, VOCABULARY).float()
    return (scores + noise * torch.randn(scores.shape, generator=torch.Generator().manual_seed(3))).log_softmax(-1)


def test_without_a_prior_the_search_says_what_was_read(target: Target) -> None:
    scores = torch.randn(len(target.victims), 16, VOCABULARY, generator=torch.Generator().manual_seed(1))
    text = target.crossing.text
    found = beam_search(Prior(target.model), Readings.of(scores), text, 0.0)
    assert torch.equal(found[text], scores.argmax(-1)[text])


def test_the_search_finds_the_likeliest_text(target: Target) -> None:
    """With room for all of them, the best of all texts of three candidates a position; what comes after the end of a
    text, or before its beginning, has no say.
    """
    scores = torch.randn(3, 4, VOCABULARY, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    text = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 1, 1, 1]]).bool()
    found = beam_search(Prior(target.model), Readings.of(scores, 3), text, 3.0, beams=81)
    for row, there in enumerate(text):
        own = scores[row, there]
        every = torch.tensor(list(itertools.product(*own.topk(3).indices.tolist())))
        with torch.no_grad():
            likely = target.model(every).logits.log_softmax(-1)[:, :-1].gather(2, every[:, 1:, None]).sum((1, 2))
        read = own.gather(1, every.T).sum(0)
        assert torch.equal(found[row, there], every[(read + 3.0 * likely).argmax()])
        assert not torch.equal(found[row, there], every[read.argmax()])


def test_a_language_that_is_known_makes_good_what_noise_takes() -> None:
    tokens = chains()
    scores, text = blurred(tokens, 1.4), torch.ones_like(tokens, dtype=torch.bool)
    alone = (scores.argmax(-1) == tokens).float().mean().item()
    helped = (beam_search(Chain(), Readings.of(scores), text, 1.0) == tokens).float().mean().item()
    assert alone < 0.75
    assert helped > alone + 0.15


def test_the_priors_weight_is_that_of_the_attackers_own_text() -> None:
    tokens = chains()
    assert best_weight(Chain(), Readings.of(blurred(tokens, 2.5)), tokens) > 0
    unlike = torch.randint(VOCABULARY, tokens.shape, generator=torch.Generator().manual_seed(4))
    assert best_weight(Chain(), Readings.of(blurred(unlike, 2.5)), unlike) == 0.0, (
        "on text of another language it only misleads"
    )
    assert min(WEIGHTS) == 0.0


def test_it_reads_what_crosses(target: Target, beam: Beam) -> None:
    assert target.accuracy(beam.recover(target.crossing, silent).tokens) > 0.9
    assert target.accuracy(beam.recover(target.noise(), silent).tokens) < 0.05


def test_padding_on_either_side_is_no_obstacle(beam: Beam) -> None:
    left = Target(padding="left")
    noisy = left.crossing.hidden.clone()
    noisy[~left.crossing.text] = 1e3
    for hidden in (left.crossing.hidden, noisy):
        found = beam.recover(Crossing(hidden, left.crossing.mask), silent).tokens
        assert torch.equal(found >= 0, left.crossing.text)
        assert left.accuracy(found) > 0.9


def test_it_learns_what_revert_learns_and_is_kept_as_that(target: Target, beam: Beam) -> None:
    revert = Revert()
    revert.fit(target.knowledge().restricted(revert.needs), EFFORT, silent)
    assert all(torch.equal(value, beam.state()[name]) for name, value in revert.state().items() if "curve" not in name)
    assert learner_of(beam).name == "revert"
    assert learner_of(revert) is revert
    again = Beam()
    again.restore(revert.state(), target.knowledge().restricted(again.needs))
    tokens = [attack.recover(target.crossing, silent).tokens for attack in (beam, again)]
    assert torch.equal(*tokens)
    assert again.weight == beam.weight


def test_readings_are_those_of_two_readers_and_of_no_writer(target: Target, beam: Beam) -> None:
    scores = readings(beam.learner.net, target.crossing)
    assert scores.shape == (*target.crossing.mask.shape, VOCABULARY)
    assert target.accuracy(scores.argmax(-1).masked_fill(~target.crossing.text, -1)) > 0.9


def test_reading_few_texts_at_a_time_changes_nothing(target: Target, beam: Beam) -> None:
    found = likeliest(lambda part: readings(beam.learner.net, part), target.crossing)
    text = target.crossing.text
    assert torch.equal(found.tokens[:, :, 0][text], readings(beam.learner.net, target.crossing).argmax(-1)[text])


def test_it_declares_the_public_base() -> None:
    assert Beam.needs - Revert.needs == {Access.PRIOR}
    assert Access.WEIGHTS not in Beam.needs
