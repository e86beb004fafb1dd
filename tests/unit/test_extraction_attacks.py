"""Attacks on a whole adapter, and what their clones are worth: each works where it should, and fails elsewhere."""

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from extraction_support import Small, small
from torch import nn

from splitveil.errors import BaseModelError, ConfigurationError, DataError
from splitveil.extraction import calibrate as calibration
from splitveil.extraction.calibrate import Calibration, Dial, calibrate, rows_needed
from splitveil.extraction.honest import converse, regress, relative_error
from splitveil.extraction.measure import (
    Judge,
    chosen_queries,
    directed_queries,
    honest_text,
    published_half,
    span_of_b,
    trained_rows,
)
from splitveil.extraction.span import outside, span
from splitveil.extraction.target import Delta, Target, errors, publish_target
from splitveil.extraction.through import served
from splitveil.extraction.worth import Perplexity, Text, attached, hooked, perplexity, share_lost
from splitveil.private.core import LayerSpec
from splitveil.private.directions import Directions
from splitveil.private.layer import public_half
from splitveil.private.layer import publish as publish_layers


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Small:
    torch.set_num_threads(1)
    return small(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def quiet(case: Small) -> Judge:
    return Judge(case.model, publish_target(case.adapter, 0.0), case.text)


@pytest.fixture(scope="module")
def noisy(case: Small) -> Judge:
    return Judge(case.model, publish_target(case.adapter, 0.1), case.text)


# -- the judge ---------------------------------------------------------------------------------------------------------


def test_the_truth_is_worth_what_peft_is(case: Small, quiet: Judge) -> None:
    base = perplexity(case.model, case.text)
    with attached(case.model, quiet.target.truth):
        ours = perplexity(case.model, case.text)
    assert ours.value == pytest.approx(perplexity(case.peft, case.text).value, rel=1e-5)
    assert ours.value < 0.8 * base.value, "an adapter that gains nothing has nothing to steal"
    assert ours.low < ours.value < ours.high
    assert perplexity(case.model, case.text).value == base.value, "the model must be as it was"


def test_through_the_protocol_it_is_worth_the_same(case: Small, quiet: Judge) -> None:
    with served(case.model, quiet.target):
        private = perplexity(case.model, case.text)
    assert private.value == pytest.approx(perplexity(case.peft, case.text).value, rel=1e-3)


def test_errors_of_the_truth_of_nothing_and_of_half(quiet: Judge) -> None:
    truth = quiet.target.truth
    assert max(errors(truth, truth).values()) < 1e-7
    assert set(errors({}, truth).values()) == {1.0}
    half = {name: Delta(delta.left / 2, delta.right) for name, delta in truth.items()}
    assert errors(half, truth)[""] == pytest.approx(0.5)
    one = Delta(np.array([[1.0], [2.0]]), np.array([[3.0, 0.0, 1.0]]))
    other = Delta(np.array([[0.5], [1.0]]), np.array([[2.0, 1.0, 0.0]]))
    direct = np.linalg.norm(one.left @ one.right - other.left @ other.right) ** 2
    assert one.square_distance(other) == pytest.approx(direct)
    assert math.isnan(errors({}, {"m": Delta(np.zeros((2, 1)), np.ones((1, 3)))})["m"])


def test_a_model_without_the_modules_is_refused(quiet: Judge) -> None:
    with pytest.raises(BaseModelError, match="no module"), hooked(nn.Linear(2, 2), {"absent": lambda m, a, o: o}):
        pass


def test_text_that_does_not_fill_two_windows_is_refused() -> None:
    class Tokenizer:
        eos_token_id = None

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) % 100 for c in text]}

    with pytest.raises(DataError, match="give more"):
        Text.of(Tokenizer(), ["short"], tokens=100, length=10)
    text = Text.of(Tokenizer(), ["a longer text than that"], tokens=100, length=10)
    assert text.windows.shape == (2, 10)
    mine, theirs = text.halves()
    assert len(mine.windows) == len(theirs.windows) == 1


# -- (a) chosen, (a') directed -----------------------------------------------------------------------------------------


def test_chosen_queries_clone_the_adapter_from_d_rows(case: Small, quiet: Judge) -> None:
    found = chosen_queries(quiet, 96)
    assert found["error"][0] < 1e-3
    assert found["exact"][0] == 1.0
    assert found["perplexity"][0] == pytest.approx(quiet.adapter()["perplexity"][0], rel=1e-3)
    assert {name.partition(":")[2] for name in found if name.startswith("error:")} == set(quiet.target.truth)


def test_chosen_queries_fewer_than_columns_do_not(noisy: Judge) -> None:
    found = chosen_queries(noisy, 32)
    assert found["error"][0] > 0.5
    assert found["exact"][0] == 0.0
    base, best = noisy.base()["perplexity"][0], noisy.adapter()["perplexity"][0]
    assert found["perplexity"][0] > best + 0.15 * (base - best)


def test_the_ladder_clones_it_through_noise(noisy: Judge) -> None:
    few, many = chosen_queries(noisy, 96), chosen_queries(noisy, 4 * 96)
    assert few["exact"][0] == 0.0
    assert many["exact"][0] == 1.0
    assert many["error"][0] < 1e-3 < few["error"][0] < 0.1


def test_directed_queries_beat_columns_where_rows_are_few(noisy: Judge) -> None:
    directed, columns = directed_queries(noisy, 24), chosen_queries(noisy, 24)
    assert directed["error on text"][0] < columns["error on text"][0] - 0.05
    assert directed["error on text"][0] > 0.1, "24 rows are not enough for a clone"


# -- (b) honest --------------------------------------------------------------------------------------------------------


def test_honest_text_clones_the_function_after_a_few_times_d_rows(quiet: Judge) -> None:
    few, many = honest_text(quiet, 16), honest_text(quiet, 400)
    assert few["error on text"][0] > 0.4
    assert many["error on text"][0] < 0.03
    assert many["perplexity"][0] == pytest.approx(quiet.adapter()["perplexity"][0], rel=0.01)


def test_a_transcript_has_the_noise_that_it_says(noisy: Judge) -> None:
    inputs = noisy.seen(300)[0]
    inputs[7] = 0
    target = noisy.target
    (transcript,) = converse(target.publication, target.served.half.answer, [0], inputs)
    true = inputs.astype(np.float64) @ target.core(0).T * target.publication.layers[0].step
    kept = transcript.deviations > 0
    assert kept.sum() == len(inputs) - 1
    scaled = (transcript.outputs - true)[kept] / transcript.deviations[kept, None]
    assert scaled.std() == pytest.approx(1.0, rel=0.1)
    assert abs(scaled.mean()) < 0.1


def test_more_text_than_there_is_is_refused(quiet: Judge) -> None:
    with pytest.raises(ConfigurationError, match="tokens"):
        quiet.seen(10**6)
    with pytest.raises(ConfigurationError, match="--data"):
        Judge(quiet.model, quiet.target, None).seen(1)


def test_regression_with_no_equation_is_no_knowledge(quiet: Judge) -> None:
    target = quiet.target
    zeros = np.zeros((5, target.publication.layers[0].width), dtype=np.float32)
    (transcript,) = converse(target.publication, target.served.half.answer, [0], zeros)
    found = regress(transcript, target.publication.layers[0].step)
    assert relative_error(found, target.core(0)) == 1.0


# -- (c) the trained A -------------------------------------------------------------------------------------------------


def test_a_known_row_space_clones_the_adapter_from_r_rows_and_not_from_fewer(quiet: Judge, noisy: Judge) -> None:
    assert trained_rows(quiet, 4)["error"][0] < 1e-3
    assert trained_rows(noisy, 4)["error"][0] < 0.15
    assert trained_rows(quiet, 3)["error"][0] > 0.2


# -- (e) span(B) -------------------------------------------------------------------------------------------------------


def test_r_answers_show_the_span_of_b_and_fewer_do_not(quiet: Judge) -> None:
    assert span_of_b(quiet, 4)["span unknown"][2] < 1e-2
    assert span_of_b(quiet, 3)["span unknown"][1] > 0.4


@pytest.mark.parametrize("engine", ["plain", "lattice", "sealed"])
def test_the_span_shows_in_the_answers_of_any_engine(engine: str) -> None:
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((4, 40)).astype(np.float32), rng.standard_normal((50, 4)).astype(np.float32)
    spec = LayerSpec(a, b, 1.0, (("m", 50),))
    x = rng.standard_normal((4, 40)).astype(np.float32)
    if engine == "sealed":
        pytest.importorskip("seal", reason="the sealed engine needs seal-python")
        from sealed_support import ends

        (outputs,) = ends([spec]).ask([0], x)
    else:
        half, publication = publish_layers([spec], engine=engine, allow_insecure=engine == "plain")
        site = public_half(publication).site([0])
        query, pending = site.query(x, site.make_masks(4))
        (core,) = site.recover(pending, half.answer([0], 4, query))
        q = publication.layers[0].Q
        assert q is not None
        outputs = core @ q.T
    assert outside(span(outputs.astype(np.float64), 4), b) < 1e-3
    assert outside(span(outputs[:3].astype(np.float64), 4), b) > 0.4


def test_the_span_of_nothing() -> None:
    assert outside(span(np.zeros((3, 50)), 4), np.eye(50, 4, dtype=np.float32)) == pytest.approx(1.0)
    assert math.isnan(outside(np.zeros((50, 0)), np.zeros((50, 2), dtype=np.float32)))


# -- (d) the published half --------------------------------------------------------------------------------------------


def test_the_published_half_of_a_real_adapter_is_out_of_reach(quiet: Judge) -> None:
    with pytest.raises(ConfigurationError, match="149 bits"):
        published_half(quiet, 0)


# -- the dial ----------------------------------------------------------------------------------------------------------


def test_calibration_proposes_what_the_gain_bears_and_says_how_little_it_buys(case: Small) -> None:
    found = calibrate(case.model, case.adapter, case.text, fraction=0.05, grid=(0.0, 0.02, 0.3, 4.0))
    assert found.dials[0].lost == 0.0
    assert found.proposal.lost <= 0.05
    beyond = [dial for dial in found.dials if dial.noise > found.proposal.noise]
    assert beyond, "the grid must reach noise that costs more"
    assert beyond[0].lost > 0.05
    assert beyond[0].noise / found.proposal.noise < 1.5
    assert all(dial.low <= dial.lost <= dial.high for dial in found.dials)
    assert found.beyond == beyond[0]
    sentence = found.sentence()
    assert f"--noise {found.proposal.noise:.3g}" in sentence
    assert "of the adapter's gain" in sentence
    assert f"{beyond[0].noise:.3g}, costs {100 * beyond[0].lost:.1f} %" in sentence
    assert f"{found.proposal.rows[1]:,} for 1 %" in sentence


@pytest.mark.parametrize("price", [0.0, 0.05, 0.1])
def test_a_grid_that_ends_too_early_is_prolonged(monkeypatch: pytest.MonkeyPatch, price: float) -> None:
    """Perplexity 20 without the adapter, 10 with it; noise δ costs ``price``·δ of the gain."""
    noises: list[float | None] = [None]

    def publish(adapter: object, noise: float) -> float:
        noises.append(noise)
        return noise

    def measured(model: object, text: object) -> Perplexity:
        noise = noises[-1]
        value = 20.0 if noise is None else 10 + 10 * price * noise
        return Perplexity(value, value, value, np.log([value, value]))

    monkeypatch.setattr(calibration, "publish_target", publish)
    monkeypatch.setattr(calibration, "served", lambda model, target: nullcontext())
    monkeypatch.setattr(calibration, "perplexity", measured)
    monkeypatch.setattr(calibration, "rows_needed", lambda target, directions: (1, 2, 3))
    monkeypatch.setattr(calibration, "directions_if_known", lambda *_: {})
    monkeypatch.setattr(calibration, "Guesses", lambda *_: None)
    nothing: Any = None
    found = calibrate(nothing, SimpleNamespace(path=None), nothing, fraction=0.3, grid=(0.0, 0.1))
    assert found.proposal.lost <= 0.3
    if price < 0.03:
        assert (found.proposal.noise, found.beyond) == (10.0, None)
    else:
        assert found.beyond is not None
        assert found.proposal.noise < 0.3 / price < found.beyond.noise < 1.3 * found.proposal.noise


def test_a_proposal_beyond_the_searched_rows_says_so() -> None:
    nats = np.log([10.0, 10.0])
    quiet = Dial(0.0, Perplexity(10.0, 9.0, 11.0, nats), 0.0, 0.0, 0.0, (5, 6, 7))
    loud = Dial(10.0, Perplexity(10.0, 9.0, 11.0, nats), 0.02, 0.015, 0.03, (500, None, None))
    sentence = Calibration(Perplexity(20.0, 19.0, 21.0, 2 * nats), (quiet, loud), 0.05, loud).sentence()
    assert "costs 2.0 % of the adapter's gain (1.5 – 3.0 % over windows of text; allowed: 5 %)" in sentence
    assert "the loudest that can be set" in sentence
    assert "500 rows for an error of 10 %, an unknown number for 1 % and an unknown number for the exact" in sentence


def test_what_noise_costs_is_compared_window_by_window() -> None:
    """Windows differ in perplexity far more than the noise costs; the interval is that of the cost."""
    easy = np.random.default_rng(0).uniform(1, 3, 40)

    def found(more: float) -> Perplexity:
        return Perplexity(float(np.exp((easy + more).mean())), 0.0, 0.0, easy + more)

    lost, low, high = share_lost(found(1.0), found(0.0), found(0.01))
    assert low <= lost <= high
    assert high - low < 1e-6, "every window loses the same share"
    uneven = easy + np.where(easy > 2, 0.2, 0.0)
    other = Perplexity(float(np.exp(uneven.mean())), 0.0, 0.0, uneven)
    lost, low, high = share_lost(found(1.0), found(0.0), other)
    assert 0 < low < lost < high < 0.2


def test_calibration_where_there_is_no_gain_or_no_sense(case: Small) -> None:
    torch.manual_seed(1)
    start = torch.arange(2, 18)[:, None]
    own = case.model.generate(
        input_ids=start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, max_new_tokens=32
    )
    elsewhere = Text(own)  # the base model's own text, on which any adapter loses
    with pytest.raises(ConfigurationError, match="gains nothing"):
        calibrate(case.model, case.adapter, elsewhere, grid=(0.0,))
    with pytest.raises(ConfigurationError, match="between 0 and 1"):
        calibrate(case.model, case.adapter, case.text, fraction=0.0)


def test_rows_needed_are_those_of_the_layer_that_falls_first(quiet: Judge) -> None:
    target: Target = quiet.target
    ten, one, exact = rows_needed(target, {})
    assert ten is not None
    assert one is not None
    assert exact == 64, "d = 64 falls before d = 96"
    assert ten <= one <= exact
    name = target.publication.layers[-1].outputs[0][0]
    assert rows_needed(target, {name: (Directions((64,), (0.0,), 4.0), Directions((3, 64), (0.005, 0.0), 4.0))}) == (
        3,
        one,
        exact,
    )
