"""A as PEFT drew it before training: found by its seed, and worth rows, on an adapter that was trained for hours."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from extraction_support import SEED, TARGETS, Small, small
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from splitveil.adapters import load_adapter
from splitveil.embedded import folder
from splitveil.errors import ConfigurationError
from splitveil.extraction.calibrate import channel_of
from splitveil.extraction.guessed import CHECKING_ROWS, Guesses, recognise
from splitveil.extraction.known import row_space
from splitveil.extraction.measure import Judge, directed_queries, honest_text, initial_rows, worth_of_directions
from splitveil.extraction.prior import Plan, _shared_out, informed, root_of_prior
from splitveil.extraction.target import errors, publish_target
from splitveil.extraction.worth import Text
from splitveil.private.leakage import directed_error

CLINIC_SEED = 1  # training/clinic_adapter.py


@pytest.fixture(scope="module")
def base() -> torch.nn.Module:
    torch.set_num_threads(1)
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder("base"), dtype=torch.float32).eval()
    return model


def clinic(base: torch.nn.Module, noise: float, guesses: str) -> Judge:
    """Without text: the error of ΔW counts."""
    target = publish_target(load_adapter(folder("clinic")), noise)
    return Judge(base, target, None, Guesses(base, folder("clinic"), guesses))


@pytest.fixture(scope="module")
def drifted(tmp_path_factory: pytest.TempPathFactory) -> Small:
    torch.set_num_threads(1)
    return small(tmp_path_factory.mktemp("drifted"), drift=0.06)


# -- which guess is right ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_seed_of_a_trained_adapter_is_found_and_a_wrong_one_is_not_taken_for_it(
    base: torch.nn.Module, noise: float
) -> None:
    judge = clinic(base, noise, "0-3")
    found = judge.recognised
    assert found.name == f"seed {CLINIC_SEED}"
    assert found.surprise == pytest.approx(0.85, abs=0.02)
    assert found.surprise < found.certain < found.chance == pytest.approx(np.sqrt(1 - 16 / 256))
    wrong = clinic(base, noise, "2-4")
    assert wrong.recognised.surprise > wrong.recognised.certain
    with pytest.raises(ConfigurationError, match="no initial A is recognised"):
        initial_rows(wrong, 16)


def test_guesses_share_the_answers_that_tell_them_apart(base: torch.nn.Module) -> None:
    client = clinic(base, 0.0, "0").target.client()
    recognise(client, Guesses(base, folder("clinic"), "0-2"))
    assert set(client.rows) == {16 + CHECKING_ROWS}


def test_an_a_that_was_never_trained_surprises_by_nothing(tmp_path: Path) -> None:
    case = small(tmp_path)
    judge = Judge(case.model, publish_target(case.adapter, 0.1), None, Guesses(case.model, case.folder, "6-8"))
    assert judge.recognised.name == f"seed {SEED}"
    assert judge.recognised.surprise < 0.1
    assert initial_rows(judge, 4)["error"][0] < 0.15
    assert initial_rows(judge, 3)["error"][0] > 0.2


def test_a_folder_is_a_guess(drifted: Small, tmp_path: Path) -> None:
    torch.manual_seed(SEED)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    get_peft_model(drifted.model.__class__(drifted.model.config), config).save_pretrained(
        tmp_path / "other", save_embedding_layers=False
    )
    seeded = dict(Guesses(drifted.model, drifted.folder, str(SEED)))
    ((name, rows),) = Guesses(drifted.model, drifted.folder, str(drifted.folder))
    assert name == str(drifted.folder)
    assert set(rows) == set(seeded[f"seed {SEED}"])
    client = publish_target(drifted.adapter, 0.0).client()
    assert recognise(client, [(name, rows)]).surprise < 1e-3, "it is the trained A itself"
    ((name, rows),) = Guesses(drifted.model, drifted.folder, str(tmp_path / "other"))
    other = recognise(client, [(name, rows)])
    assert other.surprise > other.certain


def test_drawing_leaves_model_and_generator_as_they_were(drifted: Small) -> None:
    before = {
        name: (parameter.data_ptr(), parameter.requires_grad) for name, parameter in drifted.model.named_parameters()
    }
    state = torch.get_rng_state()
    (first,), (second,) = (list(Guesses(drifted.model, drifted.folder, "3")) for _ in range(2))
    assert all((first[1][name] == second[1][name]).all() for name in first[1])
    assert {
        name: (parameter.data_ptr(), parameter.requires_grad) for name, parameter in drifted.model.named_parameters()
    } == before
    assert not hasattr(drifted.model, "peft_config")
    assert (torch.get_rng_state() == state).all()


@pytest.mark.parametrize("text", ["0,", "a-b", "no/such/folder", "1-2-3"])
def test_a_guess_that_is_neither_a_folder_nor_seeds_is_refused(drifted: Small, text: str) -> None:
    with pytest.raises(ConfigurationError, match="neither a folder nor seeds"):
        Guesses(drifted.model, drifted.folder, text)


def test_no_guess_and_a_guess_at_another_adapter_are_refused(drifted: Small) -> None:
    target = publish_target(drifted.adapter, 0.0)
    with pytest.raises(ConfigurationError, match="--initial"):
        _ = Judge(drifted.model, target, None).recognised
    with pytest.raises(ConfigurationError, match="at least one guess"):
        recognise(target.client(), [])
    nothing: Mapping[str, np.ndarray] = {}
    with pytest.raises(ConfigurationError, match="no A for"):
        recognise(target.client(), [("other", nothing)])


# -- what it is worth --------------------------------------------------------------------------------------------------


def without_prior(judge: Judge, rows: int) -> float:
    """The error of ΔW of the same attack where no direction is preferred."""
    client, cores = judge.target.client(), {}
    for index, layer in enumerate(judge.target.publication.layers):
        prior = root_of_prior(row_space(judge.recognised.rows[layer.outputs[0][0]]), 1.0)
        assert np.allclose(prior, prior[0, 0] * np.eye(layer.width))
        plan = Plan.of(prior, np.eye(layer.width))
        cores[index] = informed(client, index, rows, plan, plan.peak_ratio(judge.target.core(index)))
    return errors(judge.target.clone(cores), judge.target.truth)[""]


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_initial_a_pays_at_few_rows_and_costs_nothing_at_d(base: torch.nn.Module, noise: float) -> None:
    judge = clinic(base, noise, "1")
    found = {rows: initial_rows(judge, rows)["error"][0] for rows in (16, 64, 256)}
    plain = {rows: without_prior(judge, rows) for rows in (16, 64, 256)}
    assert found[16] < plain[16] - 0.1
    assert found[64] < plain[64] - 0.08
    assert found[256] < 1.01 * plain[256] + 1e-4
    assert found[16] > found[64] > found[256], "the prior is no constraint: more rows go on improving it"


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_judged_on_text_it_is_at_no_number_of_rows_worse_than_directed_or_honest(drifted: Small, noise: float) -> None:
    target = publish_target(drifted.adapter, noise)
    judge = Judge(drifted.model, target, drifted.text, Guesses(drifted.model, drifted.folder, str(SEED)))
    for rows in (8, 64, 96):
        ours = initial_rows(judge, rows)
        for other in (directed_queries, honest_text):
            assert ours["error on text"][0] < 1.05 * other(judge, rows)["error on text"][0] + 1e-3


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_ledgers_curve_of_it_is_what_it_reaches(drifted: Small, noise: float) -> None:
    """A vendor measures two orders; in that of the initial A, the attack is at no layer far from what is said."""
    guesses = Guesses(drifted.model, drifted.folder, str(SEED))
    curves = worth_of_directions(Judge(drifted.model, publish_target(drifted.adapter, 0.0), drifted.text, guesses))
    judge = Judge(drifted.model, publish_target(drifted.adapter, noise), drifted.text, guesses)
    ratios = []
    for rows in (8, 32, 56):
        found = initial_rows(judge, rows)
        for index, layer in enumerate(judge.target.publication.layers):
            name = layer.outputs[0][0]
            assert len(curves[name]) == 2
            said = directed_error(channel_of(judge.target, index), curves[name][1], rows)
            ratios.append(found[f"error:{name}"][0] / said)
    assert 0.85 < np.mean(ratios) < 1.2
    assert max(ratios) < 1.5
    assert min(ratios) > 0.75


def test_without_a_guess_that_is_right_there_is_one_order(drifted: Small) -> None:
    target = publish_target(drifted.adapter, 0.0)
    for guesses in (None, Guesses(drifted.model, drifted.folder, "900-903")):
        curves = worth_of_directions(Judge(drifted.model, target, drifted.text, guesses))
        assert {len(found) for found in curves.values()} == {1}
        assert {curve.counts[-1] for found in curves.values() for curve in found} == {64, 96}


def test_too_little_text_for_an_order_is_refused(drifted: Small) -> None:
    few = Text(drifted.text.windows[:3])
    with pytest.raises(ConfigurationError, match="66 tokens, and a layer 96 inputs: give more"):
        worth_of_directions(Judge(drifted.model, publish_target(drifted.adapter, 0.0), few))


def test_rows_go_where_they_take_most_off_the_error() -> None:
    variances = np.array([4.0, 1.0, 0.25])
    assert _shared_out(variances, np.full(3, 1e-9), 3).tolist() == [1, 1, 1]
    assert _shared_out(variances, np.full(3, 1e-9), 2).tolist() == [1, 1, 0]
    noises = np.array([2.0, 1.0, 3.0])

    def left(counts: tuple[int, ...]) -> float:
        return float((variances / (1 + np.array(counts) * variances / noises)).sum())

    plans = [(a, b, 7 - a - b) for a in range(8) for b in range(8 - a)]
    assert left(tuple(_shared_out(variances, noises, 7))) == pytest.approx(min(map(left, plans)))
