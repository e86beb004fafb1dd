"""Gradients of a device that trains name its text; without them, or with noise in their place, nothing is gained."""

import math
from dataclasses import replace

import pytest
import torch
from attack_support import VOCABULARY, Target
from equivalence.support import NO_SHARED, SHARED, random_model, random_prompts, tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, PretrainedConfig

from splitveil.attacks.attack import Effort, Recovery, silent
from splitveil.attacks.gradient import Gradient, _before
from splitveil.attacks.knowledge import Access, Knowledge, Oracle, Shadow
from splitveil.attacks.matching import PREDICTED, SHORTLIST, Matcher, unit
from splitveil.attacks.mlp import Mlp
from splitveil.auditing.cloud import Head, UpperBlocks, returned_gradient
from splitveil.errors import ConfigurationError, NonFiniteError
from splitveil.split import Crossing, cut, cut_in_three
from splitveil.splitlearning.loss import next_tokens, summed_loss

EFFORT = Effort(seconds=60, steps=30)
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": tiny_llama(),
    "gpt2": GPT2Config(vocab_size=160, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.125),
    # Its head bends the logits, so that the gradient is no longer a difference of two rows of a matrix.
    "gemma2": Gemma2Config(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.125,
        final_logit_softcapping=3.0,
    ),
}


def heavy_noise(crossing: Crossing) -> Crossing:
    """Five times as much noise as there is of the states."""
    noise = torch.randn(crossing.hidden.shape, generator=torch.Generator().manual_seed(int(crossing.hidden.sum())))
    return crossing.with_hidden(crossing.hidden + 5 * crossing.hidden.std() * noise)


def attack_on(target: Target) -> Gradient:
    attack = Gradient()
    attack.fit(target.knowledge().restricted(attack.needs), EFFORT, silent)
    return attack


def shares(target: Target, tokens: Tensor) -> tuple[float, float]:
    """Recovered of the texts' first tokens, and of all others."""
    text = target.crossing.text
    later, right = _before(text), tokens == target.victims
    return right[text & ~later].float().mean().item(), right[later].float().mean().item()


@pytest.fixture(scope="module", params=["right", "left"])
def target(request: pytest.FixtureRequest) -> Target:
    return Target(padding=request.param)


@pytest.fixture(scope="module")
def fitted(target: Target) -> Gradient:
    return attack_on(target)


@pytest.fixture(scope="module")
def noised() -> Target:
    return Target(protect=heavy_noise)


@pytest.fixture(scope="module")
def fitted_noised(noised: Target) -> Gradient:
    return attack_on(noised)


def test_gradients_name_all_tokens_but_the_first(target: Target, fitted: Gradient) -> None:
    found = fitted.recover(target.training, silent)
    first, later = shares(target, found.tokens)
    assert later == 1.0
    assert 0.1 < first < 1.0, "only the reader speaks of the first token"
    speaks = _before(target.crossing.text)
    for name in ("distance", "gap"):
        assert torch.equal(~found.facts[name].isnan(), speaks)
    assert found.facts["distance"][speaks].max() < 1e-3
    assert found.facts["gap"][speaks].min() > 0.1


def test_noise_on_the_states_does_not_help(noised: Target, fitted_noised: Gradient) -> None:
    alone = Mlp()
    alone.fit(noised.knowledge().restricted(alone.needs), EFFORT, silent)
    assert noised.accuracy(alone.recover(noised.crossing, silent).tokens) < 0.1
    assert shares(noised, fitted_noised.recover(noised.training, silent).tokens)[1] == 1.0


def recovered_with(attack: Gradient, target: Target, gradient: Tensor) -> Recovery:
    return attack.recover(target.training.with_gradient(gradient), silent)


def test_without_their_content_gradients_add_nothing(
    target: Target, fitted: Gradient, noised: Target, fitted_noised: Gradient
) -> None:
    """The reader's level remains; so it is the gradient that did it."""
    draw = torch.Generator().manual_seed(8)
    for where, attack in ((target, fitted), (noised, fitted_noised)):
        gradient = where.training.gradient
        assert gradient is not None
        alone = where.accuracy(attack._reader.recover(where.crossing, silent).tokens)
        elsewhere = where.accuracy(recovered_with(attack, where, gradient.roll(1, 0)).tokens)
        noise = where.accuracy(recovered_with(attack, where, torch.randn(gradient.shape, generator=draw)).tokens)
        zero = recovered_with(attack, where, torch.zeros_like(gradient))
        assert abs(noise - alone) < 0.03
        # Another text's gradients name that other text's tokens.
        assert elsewhere < alone + 0.03
        assert where.accuracy(zero.tokens) == pytest.approx(alone)
        assert zero.facts["distance"].isnan().all()


def test_the_normaliser_is_not_needed(target: Target, fitted: Gradient) -> None:
    gradient = target.training.gradient
    assert gradient is not None
    scale = 10 ** torch.empty(len(gradient), 1, 1).uniform_(-12, 6, generator=torch.Generator().manual_seed(1))
    plain, scaled = (recovered_with(fitted, target, g).tokens for g in (gradient, gradient * scale))
    assert torch.equal(plain, scaled)


def test_a_head_of_the_devices_own_costs_something_and_not_all(noised: Target, fitted_noised: Gradient) -> None:
    """The victims' head differs from the public one that the attacker has."""
    scores = []
    for size in (0.0, 0.3, 30.0):
        draw = torch.Generator().manual_seed(3)
        weight = noised.model.get_output_embeddings().weight
        change = size * weight.std() * torch.randn(weight.shape, generator=draw)

        def head(hidden: Tensor, change: Tensor = change) -> Tensor:
            norm = noised.model.model.norm(hidden)
            return noised.head(hidden) + norm @ change.T

        states = UpperBlocks(noised.model, 1)(noised.crossing)
        gradient = returned_gradient(head, states, noised.victims.clamp(min=0), noised.crossing.text)
        scores.append(shares(noised, recovered_with(fitted_noised, noised, gradient).tokens)[1])
    assert scores[0] == 1.0
    assert scores[1] > 0.8
    assert scores[2] < 0.1


def test_without_gradients_it_refuses_before_it_learns(target: Target, fitted: Gradient) -> None:
    with pytest.raises(ConfigurationError, match="--training"):
        fitted.recover(target.crossing, silent)
    attack = Gradient()
    known = replace(target.knowledge().restricted(attack.needs), gradients=False)
    with pytest.raises(ConfigurationError, match="--training"):
        attack.fit(known, EFFORT, silent)
    assert known.oracle.sequences == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none_are_refused(target: Target, fitted: Gradient, value: float) -> None:
    assert target.training.gradient is not None
    with pytest.raises(NonFiniteError):
        recovered_with(fitted, target, target.training.gradient.clone().fill_(value))


def test_what_was_learnt_survives_the_disk(target: Target, fitted: Gradient) -> None:
    again = Gradient()
    state = {name: tensor.clone() for name, tensor in fitted.state().items()}
    again.restore(state, target.knowledge().restricted(again.needs))
    first, second = (attack.recover(target.training, silent) for attack in (fitted, again))
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.facts["gap"].nan_to_num(9), second.facts["gap"].nan_to_num(9))


@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_hold_the_truth_and_its_distance_is_none(family: str) -> None:
    model = random_model(FAMILIES[family])
    split = cut(model, 1)
    head = Head(model, split)
    tokens = random_prompts(model, 8, 12)
    with torch.no_grad():
        states = UpperBlocks(model, 1)(split.device(tokens))
    gradient = returned_gradient(head, states, tokens, torch.ones_like(tokens, dtype=torch.bool))
    z, g, truth = states[:, :-1].flatten(0, 1), gradient[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    assert gradient[:, -1].abs().max() == 0
    matcher = Matcher(head, VOCABULARY)
    matcher.measure(z, torch.Generator().manual_seed(0))
    candidates = matcher.candidates(z, g)
    assert candidates.shape == (len(z), SHORTLIST + PREDICTED)
    assert (candidates == truth[:, None]).any(1).all()
    every = torch.arange(VOCABULARY).expand(len(z), -1)
    away = matcher.distances(z, g, every)
    assert torch.equal(away.argmin(1), truth)
    assert away.min(1).values.max() < 1e-3
    # The estimated lengths are those of the gradients themselves, relative to their mean.
    jacobian = torch.func.jacrev(head)(z[0])
    assert torch.corrcoef(torch.stack([matcher.lengths, jacobian.square().sum(1)]))[0, 1] > 0.3


def test_the_gradient_is_that_of_u_shaped_training() -> None:
    model = random_model(tiny_llama())
    three = cut_in_three(model, 1)
    tokens = random_prompts(model, 3, 9)
    mask = torch.ones_like(tokens)
    mask[0, 6:] = 0
    with torch.no_grad():
        crossing = three.device(tokens, mask)
    states = three.middle(crossing).detach().requires_grad_()
    labels = next_tokens(tokens, mask)
    loss = summed_loss(three.tail(crossing.with_hidden(states)), labels) / int((labels >= 0).sum())
    (expected,) = torch.autograd.grad(loss, states)
    upper = UpperBlocks(model, 1)(crossing)
    assert torch.equal(upper, states)
    found = returned_gradient(Head(model, cut(model, 1)), upper, tokens, crossing.text)
    assert torch.allclose(found, expected, atol=1e-7)
    assert expected.abs().max() > 1e-4


def test_a_crossing_checks_its_gradient_and_keeps_it() -> None:
    hidden, mask = torch.randn(3, 5, 8), torch.ones(3, 5, dtype=torch.long)
    for gradient in (torch.randn(3, 4, 8), torch.randn(2, 5, 8), torch.randn(3, 5), torch.ones(3, 5, 8).long()):
        with pytest.raises(ConfigurationError, match="gradient"):
            Crossing(hidden, mask, gradient)
    crossing = Crossing(hidden, mask).with_gradient(torch.randn(3, 5, 16))
    assert crossing.gradient is not None
    assert torch.equal(crossing.rows(1, 3).gradient, crossing.gradient[1:3])
    assert crossing.with_hidden(hidden[..., :4]).gradient is crossing.gradient
    assert Crossing(hidden, mask).rows(0, 1).gradient is None


def test_what_upper_blocks_cannot_read_they_refuse() -> None:
    with pytest.raises(ConfigurationError, match="width 64"):
        UpperBlocks(Target().model, 1)(Crossing(torch.zeros(1, 2, 65), torch.ones(1, 2)))


def test_directions_of_very_small_gradients() -> None:
    vectors = torch.tensor([[3e-38, 4e-38], [0.0, 0.0], [3e30, 4e30]])
    assert torch.allclose(unit(vectors), torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.6, 0.8]]))


@pytest.mark.skipif(not (SHARED / "models/stories3M").is_dir(), reason=NO_SHARED)
def test_on_a_trained_model_with_noised_states() -> None:
    model = (
        AutoModelForCausalLM.from_pretrained(SHARED / "models/stories3M", dtype=torch.float32)
        .eval()
        .requires_grad_(False)
    )
    split, vocabulary, width = cut(model, 3), model.config.vocab_size, model.config.hidden_size
    draw = torch.Generator().manual_seed(4)
    shadow = Shadow(*(torch.randint(vocabulary, (n, 12), generator=draw) for n in (64, 16)))
    upper, head = UpperBlocks(model, 3), Head(model, split)
    known = Knowledge(
        vocabulary,
        width,
        Gradient.needs,
        Oracle(split.device, heavy_noise),
        _head=head,
        _shadow=shadow,
        _cloud=upper,
        gradients=True,
    )
    attack = Gradient()
    attack.fit(known, Effort(seconds=60, steps=4), silent)
    # The first entries, bytes most of them, have one and the same embedding in this model: nothing tells them apart.
    tokens = torch.randint(300, vocabulary, (6, 12), generator=draw)
    with torch.no_grad():
        crossing = heavy_noise(split.device(tokens))
    gradient = returned_gradient(head, upper(crossing), tokens, crossing.text)
    found = attack.recover(crossing.with_gradient(gradient), silent).tokens
    assert (found == tokens)[:, 1:].float().mean() > 0.95
    noise = torch.randn(gradient.shape, generator=draw)
    assert (attack.recover(crossing.with_gradient(noise), silent).tokens == tokens).float().mean() < 0.1


def test_it_declares_what_it_needs() -> None:
    assert {Access.CLOUD, Access.HEAD} <= Gradient.needs
    assert Access.WEIGHTS not in Gradient.needs
