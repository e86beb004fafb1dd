"""The profile over cuts, on a random model, on crossings made by hand, and on a trained model where one is there."""

import math

import pytest
import torch
from equivalence.support import NO_SHARED, SHARED, random_model, random_prompts, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from splitveil.errors import ConfigurationError
from splitveil.information.profile import QUESTIONS, TEXT, TOKEN, Row, ceilings, crossings, profile
from splitveil.split import Crossing, cut

STORY = "Once upon a time there was a little girl who had a red ball. One day the dog saw it and ran to the old tree. "


def figures(rows: list[Row], estimator: str, target: str = TOKEN) -> list[float]:
    return [row.estimate.bits for row in rows if (row.estimator, row.target) == (estimator, target)]


def test_every_question_is_answered_at_every_cut_and_padding_is_left_out() -> None:
    model = random_model(tiny_llama())
    tokens = random_prompts(model, count=80, length=16)
    mask = torch.ones_like(tokens)
    mask[::2, :4] = 0
    notes: list[tuple[float, str]] = []
    rows = profile(
        crossings(model, tokens, mask, batch=32),
        tokens,
        model.get_input_embeddings().weight,
        pairs=900,
        progress=lambda done, note: notes.append((done, note)),
        total=3,
    )
    assert [row.cut for row in rows] == [block for block in range(3) for _ in QUESTIONS]
    assert {row.estimator for row in rows} == {"usable", "infonce", "renyi", "gaussian"}
    assert {row.target for row in rows} == {TOKEN, TEXT}
    assert {row.estimate.pairs for row in rows if row.target == TOKEN} == {900}
    assert [done for done, _ in notes] == pytest.approx([i / len(rows) for i in range(len(rows))])
    assert all(math.isfinite(row.estimate.bits) or row.estimate.reason for row in rows)
    for row in rows:
        if row.estimator in ("usable", "infonce") and row.target == TOKEN:
            assert abs(row.estimate.floor) < 0.1
            assert row.estimate.bits <= row.estimate.limit
    assert min(figures(rows, "usable")) > 0.3

    # What stands in padded positions changes nothing.
    nonsense = [
        (block, crossing.with_hidden(crossing.hidden.masked_fill(mask[..., None] == 0, 1e6)))
        for block, crossing in crossings(model, tokens, mask, cuts=[1])
    ]
    again = profile(nonsense, tokens, model.get_input_embeddings().weight, pairs=900)
    assert figures(again, "usable") == figures(rows, "usable")[1:2]


def test_crossings_are_what_the_device_half_sends() -> None:
    model = random_model(tiny_llama())
    tokens = random_prompts(model, count=7, length=5)
    ((block, crossing),) = crossings(model, tokens, cuts=[2], batch=3)
    assert block == 2
    with torch.no_grad():
        torch.testing.assert_close(crossing.hidden, cut(model, 2).device(tokens).hidden)


def test_noise_takes_information_away_and_the_ceiling_comes_down_on_it() -> None:
    model = random_model(tiny_llama())
    tokens = random_prompts(model, count=80, length=16)
    weight = model.get_input_embeddings().weight
    (plain,) = crossings(model, tokens, cuts=[0])
    draw = torch.Generator().manual_seed(0)
    usable = []
    for noise in (0.01, 1.0):
        defended = plain[1].with_hidden(plain[1].hidden + noise * torch.randn(plain[1].hidden.shape, generator=draw))
        measured = profile([(0, defended)], tokens, weight, pairs=1000)
        (ceiling,) = ceilings([plain], tokens, noise, pairs=1000)
        usable += figures(measured, "usable")
        assert usable[-1] < ceiling.estimate.bits
    assert usable == sorted(usable, reverse=True)
    assert usable[0] > 6
    assert ceiling.estimate.bits < 1  # 64 × ½ log2(1 + 0.125² / 1) = 0.7
    assert usable[-1] < 0.7


def test_positions_that_are_known_beforehand_do_not_count() -> None:
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, (200, 6), generator=draw)
    tokens[:, 0] = 7
    hidden = torch.nn.functional.one_hot(tokens).float()
    rows = profile([(0, Crossing(hidden, torch.ones_like(tokens)))], tokens, torch.eye(8), pairs=5000)
    assert figures(rows, "usable")[0] == pytest.approx(2, abs=0.02)
    assert {row.estimate.pairs for row in rows if row.target == TOKEN} == {1000}


def test_what_does_not_fit_is_an_error() -> None:
    tokens = torch.zeros(3, 4, dtype=torch.long)
    with pytest.raises(ConfigurationError, match=r"holds \(3, 5\) .* are \(3, 4\)"):
        profile([(0, Crossing(torch.zeros(3, 5, 8), torch.ones(3, 5)))], tokens, torch.zeros(9, 8))
    with pytest.raises(ConfigurationError, match="same tokens"):
        profile([(0, Crossing(torch.zeros(3, 4, 8), torch.ones(3, 4)))], tokens, torch.zeros(9, 8))


def test_usable_bits_fall_over_the_blocks_of_a_trained_model() -> None:
    folder = SHARED / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(NO_SHARED)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = torch.tensor(tokenizer(STORY)["input_ids"][:6])
    torch.manual_seed(2)
    with torch.no_grad():
        tokens = model.generate(
            start.repeat(80, 1), max_new_tokens=20, min_new_tokens=20, do_sample=True, pad_token_id=0
        )[:, 6:]
    rows = profile(crossings(model, tokens, cuts=[0, 2, 5]), tokens, model.get_input_embeddings().weight)
    usable = figures(rows, "usable")
    assert usable == sorted(usable, reverse=True)
    assert usable[-1] < 0.9 * usable[0]
    assert figures(rows, "infonce")[-1] < figures(rows, "infonce")[0]
