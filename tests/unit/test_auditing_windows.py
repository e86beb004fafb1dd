"""Tokens of victims and of shadow text: what is scored, what is marked, and in what pieces."""

import pytest
import torch
from auditing_support import CONTEXT, tiny_model, tiny_tokenizer

from splitveil.auditing.data import Span, Text
from splitveil.auditing.shadow import given_shadow, sampled_shadow
from splitveil.auditing.windows import TokenSpan, check_length, check_vocabulary, cut_windows, take_victims
from splitveil.errors import BaseModelError, ConfigurationError, DataError

TOKENIZER = tiny_tokenizer()


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


def test_victims_are_padded_on_the_right_and_special_tokens_are_not_scored() -> None:
    victims = take_victims(TOKENIZER, [Text("abcdef"), Text("xy")], prompts=9, tokens=5, seed=0)
    assert victims.tokens.tolist() == [ids("abcd"), [*ids("xy"), -1, -1]]
    assert victims.scored.tolist() == [[False, True, True, True, True], [False, True, True, False, False]]
    assert victims.mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert (victims.shortened, victims.indices, victims.marked) == (1, (0, 1), False)


def test_spans_become_tokens_and_only_whole_ones_count() -> None:
    text = Text("I am Zoë, in Rome", (Span(5, 8, "PERSON"), Span(13, 17, "PLACE")))
    victims = take_victims(TOKENIZER, [text], prompts=1, tokens=16, seed=0)
    # The beginning token, then "I am " are six; ë is two tokens of one character, of which both hold it.
    assert victims.spans == ((TokenSpan(6, 10, "PERSON"),),)
    assert victims.marked
    assert victims.personal[0].tolist() == [0] * 6 + [1, 1, 1, 1] + [0] * 5 + [1]


def test_a_sample_is_repeatable_and_in_order() -> None:
    texts = [Text(f"text {number}") for number in range(50)]
    first, again, other = (take_victims(TOKENIZER, texts, prompts=10, tokens=9, seed=seed) for seed in (1, 1, 2))
    assert first.indices == again.indices != other.indices
    assert list(first.indices) == sorted(first.indices)
    assert len(first.tokens) == 10


def test_nothing_to_score() -> None:
    with pytest.raises(DataError, match="token of its own"):
        take_victims(TOKENIZER, [Text("abc")], prompts=1, tokens=1, seed=0)


def test_context() -> None:
    model = tiny_model()
    check_length(model, TOKENIZER, CONTEXT)
    with pytest.raises(DataError, match=f"{CONTEXT + 1} tokens are longer than the model's context of {CONTEXT}"):
        check_length(model, TOKENIZER, CONTEXT + 1)
    with pytest.raises(ConfigurationError, match="the least is 2"):
        check_length(model, TOKENIZER, 1)


def test_the_tokenizer_of_another_model() -> None:
    model = tiny_model()
    check_vocabulary(model, torch.tensor([[0, 256, -1]]))
    with pytest.raises(BaseModelError, match="token 257, and the model has 257"):
        check_vocabulary(model, torch.tensor([[0, 257]]))


def test_windows_begin_where_texts_begin_and_waste_nothing() -> None:
    windows = cut_windows(TOKENIZER, ["abcdefgh", "ij", "kl"], tokens=4, limit=99)
    assert [TOKENIZER.decode(row) for row in windows] == ["<s>abc", "<s>def", "<s>ghi", "<s>jkl"]
    assert cut_windows(TOKENIZER, ["abcdefgh"] * 9, tokens=4, limit=2).shape == (2, 4)
    assert cut_windows(TOKENIZER, ["ab"], tokens=4, limit=2).shape == (0, 4)


def test_given_shadow_text_is_divided_by_document() -> None:
    letters = "bcdfghjklmnpqrstvwxz"
    texts = [letter * 30 for letter in letters]
    shadow = given_shadow(TOKENIZER, texts, ["quite other"], tokens=6, windows=50, seed=0)
    train, validation = ({TOKENIZER.decode(row)[3] for row in part} for part in (shadow.train, shadow.validation))
    assert len(validation) == 2
    assert train | validation == set(letters)
    assert not train & validation
    with pytest.raises(DataError, match="overlaps"):
        given_shadow(TOKENIZER, texts, ["B" * 30], tokens=6, windows=50, seed=0)
    with pytest.raises(DataError, match="one document"):
        given_shadow(TOKENIZER, ["same text", "Same text!"], ["other"], tokens=6, windows=50, seed=0)
    with pytest.raises(DataError, match="0 windows to learn from"):
        given_shadow(TOKENIZER, ["ab", "cd"], ["other"], tokens=6, windows=50, seed=0)


def test_sampled_shadow_text_is_half_the_models_own() -> None:
    model, seen = tiny_model(), []
    state = torch.get_rng_state()
    shadow = sampled_shadow(model, TOKENIZER, ["ab"], tokens=8, windows=40, seed=3, progress=seen.append)
    assert torch.equal(torch.get_rng_state(), state)
    assert shadow.train.shape == (40, 8)
    assert shadow.validation.shape[0] == 4
    assert bool((shadow.train[:, 0] == 0).all())
    assert "sampled from the model itself" in shadow.origin
    assert seen[-1] >= 1.0
    with torch.no_grad():
        surprise = torch.nn.functional.cross_entropy(
            model(shadow.train).logits[:, :-1].transpose(1, 2), shadow.train[:, 1:], reduction="none"
        ).mean(1)
    assert surprise[:20].mean() < surprise[20:].mean() - 0.5  # its own text surprises a model less than random tokens
    again = sampled_shadow(model, TOKENIZER, ["ab"], tokens=8, windows=40, seed=3, progress=seen.append)
    assert torch.equal(again.train, shadow.train)


def test_sampled_text_that_is_a_victims_is_left_out() -> None:
    model = tiny_model()
    first = sampled_shadow(model, TOKENIZER, ["ab"], tokens=8, windows=10, seed=3, progress=lambda done: None)
    known = TOKENIZER.decode(first.train[0], skip_special_tokens=True)
    again = sampled_shadow(model, TOKENIZER, [known], tokens=8, windows=10, seed=3, progress=lambda done: None)
    assert first.train[0].tolist() not in again.train.tolist()
    assert len(again.train) < len(first.train)
