"""Metrics on cases worked out by hand, and intervals that behave as intervals."""

import math

import numpy as np
import pytest
import torch
from auditing_support import tiny_tokenizer

from splitveil.auditing.data import Span, Text
from splitveil.auditing.intervals import RESAMPLES, mean, quantile, ratio
from splitveil.auditing.metrics import METRICS, bleu, check_recovery, describe_facts, rouge_l, score
from splitveil.auditing.windows import take_victims
from splitveil.errors import ConfigurationError

TOKENIZER = tiny_tokenizer()
VICTIMS = take_victims(
    TOKENIZER, [Text("Ann is in", (Span(0, 3, "PERSON"),)), Text("yes")], prompts=2, tokens=10, seed=0
)
EMBEDDINGS = torch.eye(257)


def scored(tokens: torch.Tensor) -> dict[str, float]:
    found = score(tokens, VICTIMS, TOKENIZER.decode, EMBEDDINGS, 0)
    assert tuple(found) == METRICS
    assert all(not figure.value < figure.low and not figure.value > figure.high for figure in found.values())
    return {name: figure.value for name, figure in found.items()}


def test_the_truth_scores_one_everywhere() -> None:
    assert scored(VICTIMS.tokens) == pytest.approx(dict.fromkeys(METRICS, 1.0))


def test_one_wrong_token() -> None:
    tokens = VICTIMS.tokens.clone()
    tokens[0, 3] = TOKENIZER("m")["input_ids"][1]  # Anm is in
    found = scored(tokens)
    assert found["token_accuracy"] == pytest.approx(11 / 12)  # nine tokens and three, the beginning ones not counted
    assert found["exact_match"] == 0.5
    assert found["rouge_l"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["personal_recall"] == 0.0
    assert found["personal_characters"] == pytest.approx(2 / 3)
    assert 0 < found["bleu"] < 1
    assert 0.9 < found["cosine"] < 1


def test_special_tokens_and_padding_are_not_scored() -> None:
    tokens = VICTIMS.tokens.clone()
    tokens[:, 0] = 7
    tokens[1, 5:] = 99
    assert scored(tokens)["token_accuracy"] == 1.0


def test_without_marks_personal_recall_is_not_measured() -> None:
    victims = take_victims(TOKENIZER, [Text("yes")], prompts=1, tokens=10, seed=0)
    found = score(victims.tokens, victims, TOKENIZER.decode, EMBEDDINGS, 0)
    for name in ("personal_recall", "personal_characters"):
        assert math.isnan(found[name].value)
        assert math.isnan(found[name].low)
        assert found[name].prompts == 0


def test_rouge_and_bleu_by_hand() -> None:
    assert rouge_l("the cat sat on the mat", "The cat, on a mat!") == pytest.approx(2 * 4 / 11)
    assert rouge_l("a b", "c d") == 0.0
    assert rouge_l("a b", "") == 0.0
    assert rouge_l("...", "a") is None
    assert bleu("a b c d", "a b c d") == pytest.approx(1.0)
    assert bleu("a b c d", "") == 0.0
    assert bleu(" ", "a") is None
    # 3 of 4 words, 2 of 3 pairs, 1 of 2 triples, no quadruple (sacrebleu's exponential smoothing: ½)
    assert bleu("a b c d", "a b c x") == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25)


def test_facts() -> None:
    values = torch.full(VICTIMS.tokens.shape, float("nan"))
    values[0, 1:9] = torch.arange(1.0, 9.0)
    values[:, 0] = 1e9  # a special token's
    found = describe_facts(
        {"evaluations": values, "certified": (VICTIMS.tokens == VICTIMS.tokens[0, 1]).float()}, VICTIMS, 0
    )
    assert {name: figure.value for name, figure in found.items()} == pytest.approx(
        {"evaluations_mean": 4.5, "evaluations_median": 4.5, "evaluations_p99": 7.93, "certified": 1 / 12}
    )
    assert found["evaluations_mean"].prompts == 1
    nothing = describe_facts({"gap": torch.full(VICTIMS.tokens.shape, float("nan"))}, VICTIMS, 0)
    assert all(math.isnan(figure.value) for figure in nothing.values())
    with pytest.raises(ConfigurationError, match="gap has shape"):
        describe_facts({"gap": torch.zeros(3)}, VICTIMS, 0)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (VICTIMS.tokens[:, :-1], "expected"),
        (VICTIMS.tokens.float(), "float32"),
        (VICTIMS.tokens.masked_fill(VICTIMS.scored, -1), "outside the vocabulary"),
        (VICTIMS.tokens.masked_fill(VICTIMS.scored, 257), "outside the vocabulary of 257"),
    ],
)
def test_answers_that_are_none(tokens: torch.Tensor, said: str) -> None:
    check_recovery(VICTIMS.tokens, VICTIMS, 257)
    with pytest.raises(ConfigurationError, match=said):
        check_recovery(tokens, VICTIMS, 257)


def test_ratio_weighs_by_denominator_and_skips_zeros() -> None:
    found = ratio([1, 9, 0], [2, 10, 0], seed=0)
    assert found.value == pytest.approx(10 / 12)
    assert found.prompts == 2
    assert (found.low, found.high) == (0.5, 0.9)
    assert math.isnan(ratio([0, 0], [0, 0], seed=0).value)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    draw = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        figure = ratio(draw.binomial(20, 0.3, 60), np.full(60, 20), seed=trial)
        covered += figure.low <= 0.3 <= figure.high
    assert 0.90 <= covered / 200 <= 0.985


def test_statistics_resample_prompts() -> None:
    values = np.array([[1.0, np.nan], [2.0, 3.0], [np.nan, np.nan]])
    found = quantile(values, 0.5, seed=0)
    assert (found.value, found.low, found.high, found.prompts) == (2.0, 1.0, 2.5, 2)
    found = mean(values, seed=0)
    assert (found.value, found.low, found.high, found.prompts) == (2.0, 1.0, 2.5, 2)


@pytest.mark.parametrize("share", [0.5, 0.99])
def test_resampled_quantiles_are_numpys(share: float) -> None:
    draw = np.random.default_rng(1)
    values = np.where(draw.random((12, 7)) < 0.2, np.nan, draw.integers(0, 9, (12, 7)))
    picks = np.random.default_rng(5).integers(0, 12, (RESAMPLES, 12))
    slow = [np.nanquantile(values[pick], share) for pick in picks]
    found = quantile(values, share, seed=5)
    assert found.value == pytest.approx(np.nanquantile(values, share))
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(slow, [2.5, 97.5])))
