"""Gradient descent on soft embeddings."""

import pytest
import torch
from equivalence.support import random_model, random_prompts, tiny_llama
from torch import Tensor
from transformers import Gemma2Config, GPT2Config, PretrainedConfig, PreTrainedModel

from splitveil.attacks.attack import Effort, silent
from splitveil.attacks.knowledge import Access, Knowledge, WhiteBox
from splitveil.attacks.optimise import Optimise, Prior, whole_model
from splitveil.auditing.cloud import Head, UpperBlocks
from splitveil.errors import ConfigurationError, UndeclaredKnowledgeError
from splitveil.split import Crossing, cut

FAMILIES: dict[str, PretrainedConfig] = {
    "llama": tiny_llama(initializer_range=0.06),
    "gpt2": GPT2Config(vocab_size=160, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.125),
    "gemma2": Gemma2Config(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.125,
    ),
}


def known(model: PreTrainedModel, block: int) -> Knowledge:
    split = cut(model, block)
    return Knowledge(
        model.config.vocab_size,
        64,
        Optimise.needs,
        _white_box=WhiteBox(split.device, lambda crossing: crossing),
        _head=Head(model, split),
        _cloud=UpperBlocks(model, block),
    )


def ready(knowledge: Knowledge, attack: Optimise) -> Optimise:
    attack.fit(knowledge, Effort(), silent)
    return attack


def crossed(knowledge: Knowledge, tokens: Tensor, mask: Tensor | None = None) -> Crossing:
    with torch.no_grad():
        return knowledge.white_box.device(tokens, mask)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_short_texts_after_one_block(family: str, side: str) -> None:
    model = random_model(FAMILIES[family])
    knowledge = known(model, 1)
    tokens = random_prompts(model, 3, 6)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    if side == "right":
        mask = mask.flip(1)
    recovery = ready(knowledge, Optimise(rounds=3, steps=40)).recover(crossed(knowledge, tokens, mask), silent)
    text = mask.bool()
    assert (recovery.tokens[~text] == -1).all()
    assert recovery.facts["distance"][~text].isnan().all()
    right = (recovery.tokens == tokens)[text]
    assert right.float().mean() >= 0.8
    distance = recovery.facts["distance"][text]
    assert not distance.isnan().any()
    if right.all():
        assert distance.max() < 1e-3


def test_embeddings_give_what_their_tokens_give() -> None:
    model = random_model(tiny_llama())
    white_box = known(model, 2).white_box
    tokens = random_prompts(model, 2, 5)
    soft = white_box.soft(white_box.embeddings()[tokens]).hidden
    assert torch.allclose(soft, white_box(tokens).hidden)
    assert white_box.evaluations == 4
    with pytest.raises(ConfigurationError, match="either tokens or embeds"):
        white_box.device(tokens, embeds=white_box.embeddings()[tokens])
    with pytest.raises(ConfigurationError, match="either tokens or embeds"):
        white_box.device()


def test_a_prior_decides_where_descent_has_not() -> None:
    """After one step of descent nothing is known, and the text is what the prior says."""
    model = random_model(tiny_llama())
    knowledge = known(model, 1)
    tokens = torch.arange(10, 18)[None]
    crossing = crossed(knowledge, tokens)

    def silence(prefix: Tensor, mask: Tensor) -> Tensor:
        return torch.zeros(len(prefix), 160)

    def counts_up(prefix: Tensor, mask: Tensor) -> Tensor:
        following = torch.full((len(prefix), 160), -100.0)
        return following.scatter(1, prefix[:, -1:] + 1, 0.0)

    def right(prior: Prior) -> float:
        guess = ready(knowledge, Optimise(rounds=1, steps=12, prior=prior)).recover(crossing, silent).tokens
        return (guess[:, 1:] == guess[:, :1] + torch.arange(1, 8)).float().mean().item()

    assert right(silence) < 0.9
    assert right(counts_up) == 1.0


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_prior_of_an_audit_is_the_whole_model(family: str, block: int) -> None:
    model = random_model(FAMILIES[family])
    tokens = random_prompts(model, 3, 6)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    found = whole_model(known(model, block))(tokens, mask)
    for row, text, present in zip(found, tokens, mask.bool(), strict=True):
        with torch.no_grad():
            assert torch.allclose(row, model(text[None, present]).logits[0, -1].log_softmax(-1), atol=1e-5)


def test_an_attacker_without_the_cloud_half_has_no_prior() -> None:
    knowledge = known(random_model(tiny_llama()), 1)
    with pytest.raises(UndeclaredKnowledgeError, match="the cloud half"):
        Optimise().fit(knowledge.restricted(Optimise.needs - {Access.CLOUD}), Effort(), silent)


def test_more_steps_bring_it_nearer() -> None:
    model = random_model(tiny_llama())
    knowledge = known(model, 2)
    crossing = crossed(knowledge, random_prompts(model, 2, 6))

    def distance(steps: int) -> float:
        attack = ready(knowledge, Optimise(rounds=2, steps=steps))
        return attack.recover(crossing, silent).facts["distance"].mean().item()

    assert distance(60) < distance(2)


def test_weights_get_no_gradients() -> None:
    model = random_model(tiny_llama())
    knowledge = known(model, 1)
    ready(knowledge, Optimise(rounds=1, steps=2)).recover(crossed(knowledge, random_prompts(model, 1, 4)), silent)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_state_takes_the_place_of_fitting() -> None:
    model = random_model(tiny_llama())
    knowledge = known(model, 1)
    crossing = crossed(knowledge, random_prompts(model, 1, 4))
    attack = ready(knowledge, Optimise(rounds=1, steps=20))
    again = Optimise(rounds=1, steps=20)
    again.restore(attack.state(), knowledge)
    assert torch.equal(attack.recover(crossing, silent).tokens, again.recover(crossing, silent).tokens)


def test_a_widened_crossing_is_compared_where_the_states_are() -> None:
    knowledge = known(random_model(tiny_llama(initializer_range=0.06)), 1)
    tokens = random_prompts(random_model(tiny_llama()), 2, 5)
    crossing = crossed(knowledge, tokens)
    wide = crossing.with_hidden(torch.cat([crossing.hidden, torch.ones(2, 5, 30)], 2))
    attack = ready(knowledge, Optimise(rounds=2, steps=30))
    assert torch.equal(attack.recover(wide, silent).tokens, attack.recover(crossing, silent).tokens)


def test_progress_reaches_its_end() -> None:
    knowledge = known(random_model(tiny_llama()), 1)
    attack = ready(knowledge, Optimise(rounds=1, steps=11))
    seen: list[float] = []
    crossing = crossed(knowledge, torch.ones(20, 2, dtype=torch.long))
    attack.recover(crossing, lambda done, note: seen.append(done))
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_what_it_cannot_do_is_refused() -> None:
    crossing = Crossing(torch.zeros(1, 2, 32), torch.ones(1, 2, dtype=torch.long))
    with pytest.raises(ConfigurationError, match="fit or restore"):
        Optimise().recover(crossing, silent)
    with pytest.raises(ConfigurationError, match="got \\(1, 2, 32\\)"):
        ready(known(random_model(tiny_llama()), 1), Optimise()).recover(crossing, silent)
    with pytest.raises(ConfigurationError, match="at least one round"):
        Optimise(rounds=0)
