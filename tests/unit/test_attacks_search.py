"""The white-box search: exact, certified, and cheap; and honest where it cannot be."""

from collections.abc import Callable

import pytest
import torch
from equivalence.support import NO_SHARED, SHARED, greedy, random_model, random_prompts, tiny_llama
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    PretrainedConfig,
    PreTrainedModel,
)

from splitveil.attacks.attack import Effort, Recovery, silent
from splitveil.attacks.knowledge import Access, Knowledge, WhiteBox
from splitveil.attacks.search import Search, twins
from splitveil.attacks.search_prefix import Prefixes
from splitveil.embedded import folder
from splitveil.errors import ConfigurationError
from splitveil.split import Crossing, DeviceHalf, cut

Protection = Callable[[Crossing], Crossing]

FAMILIES: dict[str, PretrainedConfig] = {
    "llama": tiny_llama(),
    "gpt2": GPT2Config(vocab_size=160, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.125),
    # Texts of 12 tokens outgrow the sliding window.
    "gemma2": Gemma2Config(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=5,
        initializer_range=0.125,
    ),
}
LENGTHS = (12, 3, 7, 1)


def plain(crossing: Crossing) -> Crossing:
    return crossing


def int8(crossing: Crossing) -> Crossing:
    scale = crossing.hidden.abs().amax(-1, keepdim=True) / 127
    return crossing.with_hidden((crossing.hidden / scale).round() * scale)


def bfloat16(crossing: Crossing) -> Crossing:
    return crossing.with_hidden(crossing.hidden.bfloat16())


def noise(size: float) -> Protection:
    draw = torch.Generator().manual_seed(5)

    def add(crossing: Crossing) -> Crossing:
        hidden = crossing.hidden
        return crossing.with_hidden(hidden + size * hidden.std() * torch.randn(hidden.shape, generator=draw))

    return add


def known(model: PreTrainedModel, block: int, protect: Protection = plain) -> Knowledge:
    granted = frozenset({Access.WEIGHTS})
    white_box = WhiteBox(cut(model, block).device, protect)
    return Knowledge(model.config.vocab_size, model.config.hidden_size, granted, _white_box=white_box)


def fitted(knowledge: Knowledge, **options: int) -> Search:
    search = Search(**options)
    search.fit(knowledge, Effort(), silent)
    return search


def crossed(knowledge: Knowledge, tokens: Tensor, mask: Tensor | None = None) -> Crossing:
    """What a victim sends; the half's own count of evaluations stays the attacker's."""
    device: DeviceHalf = knowledge.white_box.device
    with torch.no_grad():
        return knowledge.white_box.protect(device(tokens, mask))


def padded(model: PreTrainedModel, side: str) -> tuple[Tensor, Tensor]:
    """Prompts (4, 12) of different lengths, and their mask."""
    tokens, places = random_prompts(model, len(LENGTHS), max(LENGTHS)), torch.arange(max(LENGTHS))
    lengths = torch.tensor(LENGTHS)[:, None]
    mask = places < lengths if side == "right" else places >= max(LENGTHS) - lengths
    return tokens, mask.long()


def check_facts(recovery: Recovery, mask: Tensor) -> None:
    for name in ("evaluations", "distance", "gap", "certified"):
        assert (recovery.facts[name].isnan() == ~mask.bool()).all(), name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_at_every_cut(family: str, block: int, side: str) -> None:
    model = random_model(FAMILIES[family])
    knowledge = known(model, block)
    search = fitted(knowledge)
    before = knowledge.white_box.evaluations
    assert search.fitted == before
    tokens, mask = padded(model, side)
    recovery = search.recover(crossed(knowledge, tokens, mask), silent)

    assert torch.equal(recovery.tokens, tokens.masked_fill(mask == 0, -1))
    check_facts(recovery, mask)
    text = mask.bool()
    assert recovery.facts["certified"][text].min() == 1
    assert recovery.facts["distance"][text].max() < 1e-4
    assert recovery.facts["gap"][text].min() > 1e-3
    evaluations = recovery.facts["evaluations"][text]
    assert int(evaluations.sum()) == knowledge.white_box.evaluations - before, "evaluations that were not reported"
    # A random model's context swamps its tokens after two such lively blocks; trained models are below.
    assert evaluations.mean() < model.config.vocab_size / 2
    if block == 0:
        assert evaluations.mean() <= 3


def test_it_finds_what_brute_force_finds() -> None:
    model = random_model(tiny_llama())
    knowledge = known(model, 2)
    tokens = random_prompts(model, 1, 8)
    crossing = crossed(knowledge, tokens)
    recovery = fitted(knowledge).recover(crossing, silent)
    every = torch.arange(model.config.vocab_size)
    for position in range(tokens.shape[1]):
        texts = torch.cat([recovery.tokens[:, :position].expand(len(every), -1), every[:, None]], 1)
        hidden = knowledge.white_box(texts).hidden[:, -1]
        away = (hidden - crossing.hidden[0, position]).norm(dim=1)
        assert away.argmin() == recovery.tokens[0, position]
        nearest = away.topk(2, largest=False).values / crossing.hidden[0, position].norm()
        # The runner-up is the nearest of those tried, so never nearer than the nearest of all.
        assert recovery.facts["gap"][0, position] >= (nearest[1] - nearest[0]) * 0.999


@pytest.mark.parametrize("protect", [int8, bfloat16])
def test_quantised_crossings_are_matched_under_the_same_quantisation(protect: Protection) -> None:
    model = random_model(tiny_llama())
    knowledge = known(model, 1, protect)
    tokens, mask = padded(model, "left")
    recovery = fitted(knowledge).recover(crossed(knowledge, tokens, mask), silent)
    assert torch.equal(recovery.tokens, tokens.masked_fill(mask == 0, -1))
    assert recovery.facts["certified"][mask.bool()].float().mean() > 0.9


def test_a_crossing_in_a_coarser_dtype_than_the_attackers_own() -> None:
    model = random_model(tiny_llama())
    knowledge = known(model, 1)
    tokens = random_prompts(model, 3, 8)
    crossing = bfloat16(crossed(knowledge, tokens))
    search = fitted(knowledge)
    before = search.fitted
    recovery = search.recover(crossing, silent)
    assert torch.equal(recovery.tokens, tokens)
    assert recovery.facts["certified"].mean() > 0.9
    assert search.fitted > before, "no tolerance was measured for this dtype"


def test_noise_instead_of_a_crossing_is_not_certified() -> None:
    model = random_model(tiny_llama())
    knowledge = known(model, 1)
    hidden = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(3))
    recovery = fitted(knowledge, patience=20).recover(Crossing(hidden, torch.ones(2, 4, dtype=torch.long)), silent)
    assert recovery.facts["certified"].max() == 0
    assert (recovery.tokens >= 0).all()
    # The whole vocabulary once; after that this is known not to be the attacker's device half.
    assert torch.equal(recovery.facts["evaluations"], torch.tensor([[160.0, 20, 20, 20]] * 2))


def test_under_noise_the_nearest_wins_and_nothing_is_certified() -> None:
    model = random_model(tiny_llama())
    knowledge = known(model, 0, noise(0.5))
    tokens = random_prompts(model, 4, 10)
    recovery = fitted(knowledge, patience=20).recover(crossed(knowledge, tokens), silent)
    assert (recovery.tokens == tokens).float().mean() > 0.9
    # At this level of noise distances tell tokens apart but for chance; far above it nothing does.
    drowned = known(model, 0, noise(30.0))
    recovery = fitted(drowned, patience=20).recover(crossed(drowned, tokens), silent)
    assert recovery.facts["certified"].max() == 0
    assert (recovery.facts["evaluations"] == 20).all()


def test_tokens_that_nothing_tells_apart_are_not_certified() -> None:
    model = random_model(tiny_llama())
    embeddings = model.get_input_embeddings().weight.data
    embeddings[7] = embeddings[9]
    knowledge = known(model, 1)
    tokens = random_prompts(model, 1, 6)
    tokens[tokens == 7] = 8
    tokens[0, 3] = 9
    recovery = fitted(knowledge).recover(crossed(knowledge, tokens), silent)
    certified = recovery.facts["certified"][0].bool()
    assert not certified[3]
    assert recovery.tokens[0, 3] in (7, 9)
    assert certified[[0, 1, 2, 4, 5]].all()


def test_twins_are_found() -> None:
    embeddings = torch.randn(300, 8, generator=torch.Generator().manual_seed(3))
    embeddings[7] = embeddings[250] = embeddings[120]
    embeddings[30] = embeddings[31]
    embeddings[40] = embeddings[41] + 1e-3
    found = twins(embeddings, torch.arange(300))
    assert found.nonzero()[:, 0].tolist() == [7, 30, 31, 40, 41, 120, 250]
    assert twins(embeddings, torch.tensor([5, 250, 6])).tolist() == [False, True, False]


def test_twins_are_never_certified_even_if_only_one_was_tried() -> None:
    """Six tokens with one embedding: the two candidates that are tried first need not be two of them."""
    model = random_model(tiny_llama(vocab_size=400))
    model.get_input_embeddings().weight.data[394:] = model.get_input_embeddings().weight.data[394]
    tokens = torch.tensor([[3, 396, 7, 399, 11]])
    knowledge = known(model, 1)
    found = fitted(knowledge).recover(crossed(knowledge, tokens), silent)
    assert torch.equal(found.tokens[0, [0, 2, 4]], tokens[0, [0, 2, 4]])
    assert (found.tokens[0, [1, 3]] >= 394).all()
    assert found.facts["certified"].tolist() == [[1, 0, 1, 0, 1]]
    assert found.facts["gap"][0, [1, 3]].tolist() == [0, 0]


def test_a_limit_is_kept() -> None:
    model = random_model(tiny_llama())
    knowledge = known(model, 1)
    hidden = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(3))
    recovery = fitted(knowledge, limit=10).recover(Crossing(hidden, torch.ones(1, 3, dtype=torch.long)), silent)
    assert (recovery.facts["evaluations"] == 10).all()


def test_a_vocabulary_of_tens_of_thousands() -> None:
    model = random_model(tiny_llama(vocab_size=50_000, hidden_size=32, initializer_range=0.05))
    knowledge = known(model, 2)
    tokens = random_prompts(model, 2, 6)
    recovery = fitted(knowledge).recover(crossed(knowledge, tokens), silent)
    assert torch.equal(recovery.tokens, tokens)
    assert recovery.facts["certified"].min() == 1
    assert recovery.facts["evaluations"].median() <= 3


def test_state_takes_the_place_of_fitting() -> None:
    model = random_model(tiny_llama())
    knowledge = known(model, 1)
    search = fitted(knowledge)
    crossing = crossed(knowledge, random_prompts(model, 2, 5))
    again = Search()
    again.restore(search.state(), knowledge)
    first, second = search.recover(crossing, silent), again.recover(crossing, silent)
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.facts["evaluations"], second.facts["evaluations"])


def test_texts_without_a_usable_cache_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(tiny_llama())
    knowledge = known(model, 1)
    search = fitted(knowledge)
    tokens = random_prompts(model, 2, 5)

    class Uncached(Prefixes):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            self._cache = None

    monkeypatch.setattr("splitveil.attacks.search.Prefixes", Uncached)
    recovery = search.recover(crossed(knowledge, tokens), silent)
    assert torch.equal(recovery.tokens, tokens)
    assert recovery.facts["certified"].min() == 1


def test_a_batch_without_text() -> None:
    knowledge = known(random_model(tiny_llama()), 1)
    recovery = fitted(knowledge).recover(Crossing(torch.zeros(2, 3, 64), torch.zeros(2, 3, dtype=torch.long)), silent)
    assert (recovery.tokens == -1).all()
    check_facts(recovery, torch.zeros(2, 3))


def test_what_it_cannot_do_is_refused() -> None:
    crossing = Crossing(torch.zeros(1, 1, 32), torch.ones(1, 1, dtype=torch.long))
    with pytest.raises(ConfigurationError, match="fit or restore"):
        Search().recover(crossing, silent)
    with pytest.raises(ConfigurationError, match="width 64, got 32"):
        fitted(known(random_model(tiny_llama()), 1)).recover(crossing, silent)


@pytest.mark.skipif(not SHARED.exists(), reason=NO_SHARED)
def test_a_trained_model_after_its_last_block() -> None:
    model = AutoModelForCausalLM.from_pretrained(SHARED / "models" / "stories260K", dtype="float32").eval()
    knowledge = known(model, 5)
    tokens = greedy(model, random_prompts(model, 4, 2), 14)
    recovery = fitted(knowledge).recover(crossed(knowledge, tokens), silent)
    assert torch.equal(recovery.tokens, tokens)
    alone = ~twins(model.get_input_embeddings().weight.detach(), tokens.flatten()).view_as(tokens)
    assert alone.float().mean() > 0.8
    assert torch.equal(recovery.facts["certified"].bool(), alone)
    assert recovery.facts["evaluations"].mean() < model.config.vocab_size / 4


def test_the_embedded_model_costs_two_candidates_a_token() -> None:
    model = AutoModelForCausalLM.from_pretrained(folder("base"), dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder("base"))
    knowledge = known(model, 2)
    tokens = tokenizer("Question: What are the treatments for asthma?\nAnswer:", return_tensors="pt").input_ids
    recovery = fitted(knowledge).recover(crossed(knowledge, tokens), silent)
    assert torch.equal(recovery.tokens, tokens)
    assert recovery.facts["certified"].min() == 1
    assert recovery.facts["evaluations"].median() <= 3
    assert recovery.facts["evaluations"].mean() <= 10
