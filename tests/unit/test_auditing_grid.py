"""The whole audit on a tiny model: what is measured, what is kept, what is measured again, and what is refused."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from auditing_support import (
    ATTACKS,
    SHADOW,
    UNITS,
    VICTIMS,
    Fake,
    Hiding,
    WrongCeiling,
    create_attack,
    create_defence,
    tiny_model,
    tiny_tokenizer,
)
from safetensors.torch import load_file, save_file

from splitveil.attacks.catalogue import CONTROLS, create
from splitveil.attacks.knowledge import Access, Shadow
from splitveil.auditing.audit import audit
from splitveil.auditing.data import Span, Text
from splitveil.auditing.grid import Step
from splitveil.auditing.metrics import METRICS
from splitveil.auditing.outcome import Report
from splitveil.auditing.rows import Row
from splitveil.auditing.stage import Stage
from splitveil.auditing.windows import take_victims
from splitveil.defences.defence import Defence
from splitveil.defences.encrypted import EncryptedQuery
from splitveil.errors import ConfigurationError, DataError, UndeclaredKnowledgeError
from splitveil.split import Crossing

MODEL, TOKENIZER = tiny_model(), tiny_tokenizer()


def run(out: Path | None = None, texts: Any = VICTIMS, **changes: Any) -> Report:
    how: dict[str, Any] = {
        "shadow": SHADOW,
        "cuts": (0, 2),
        "attacks": ("fake",),
        "tokens": 12,
        "windows": 20,
        "create_attack": create_attack,
        "create_defence": create_defence,
    }
    return audit(MODEL, TOKENIZER, texts, out=out, **(how | changes))


def score(report: Report, attack: str, cut: int, defence: str = "none", metric: str = METRICS[-1]) -> Row:
    (row,) = [
        row for row in report.rows if (row.attack, row.cut, row.defence, row.metric) == (attack, cut, defence, metric)
    ]
    return row


@pytest.fixture
def fits() -> Any:
    """How often the fake attack learnt something since the test began."""
    before = Fake.fits
    return lambda: Fake.fits - before


def test_controls_run_everywhere_and_attacks_are_scored() -> None:
    report = run(defences=("none", "hiding"))
    assert report.valid
    for cut in (0, 2):
        for defence in ("none", "hiding"):
            assert score(report, "oracle", cut, defence).value == 1.0
            assert score(report, "floor", cut, defence).value < 0.2
    assert score(report, "fake", 0).value == 1.0  # after the embeddings, the nearest embedding is exact
    assert score(report, "fake", 0, metric="distance_mean").value == 1.0
    assert score(report, "fake", 0, "hiding").value < 0.2
    assert {row.prompts for row in report.rows if row.metric == "rouge_l"} == {len(VICTIMS)}
    assert math.isnan(score(report, "fake", 0, metric="personal_recall").value)
    assert score(report, "fake", 0, "hiding").defence_params == {"level": 1.0}


def test_personal_data_side_by_side() -> None:
    texts = ["nobody", Text("I am Ann", (Span(5, 8, "PERSON"),))]
    report = run(texts=texts, cuts=(0,))
    assert score(report, "fake", 0, metric="personal_recall").value == 1.0
    shown = next(t for t in report.texts if t["prompt_index"] == 1 and t["attack"] == "fake")
    assert shown["original"] == list("I am Ann") == shown["recovered"]
    assert shown["correct"] == [True] * 8
    assert shown["personal"] == [False] * 5 + [True] * 3
    assert shown["spans"] == [{"start": 5, "end": 8, "type": "PERSON"}]
    assert not any(t["attack"] == "oracle" for t in report.texts)


def test_a_second_run_measures_nothing_again(tmp_path: Path, fits: Any) -> None:
    first = run(tmp_path)
    content = (tmp_path / "rows.jsonl").read_bytes()
    steps: list[Step] = []
    second = run(tmp_path, watch=steps.append)
    assert (first.rows, first.texts) == (second.rows, second.texts)
    assert (tmp_path / "rows.jsonl").read_bytes() == content
    assert not steps
    assert fits() == 2
    assert second.meta["units"] == {"asked": 2 * UNITS, "measured": 0}


def test_an_interrupted_run_measures_what_is_missing(tmp_path: Path, fits: Any) -> None:
    class InterruptionError(Exception):
        """As Ctrl-C, at a place that the test chooses."""

    def interrupt(step: Step) -> None:
        if step.unit == UNITS + 1:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        run(tmp_path, watch=interrupt)
    content = (tmp_path / "rows.jsonl").read_bytes()
    report = run(tmp_path)
    assert (tmp_path / "rows.jsonl").read_bytes().startswith(content)
    assert len(report.rows) == len({row.key for row in report.rows})
    assert report.meta["units"] == {"asked": 2 * UNITS, "measured": UNITS - 1}
    assert fits() == 2
    whole = run(tmp_path / "other")
    assert [dataclasses.replace(row, seconds=0) for row in report.rows] == [
        dataclasses.replace(row, seconds=0) for row in whole.rows
    ]


def test_attacks_that_learn_the_same_learn_it_once(tmp_path: Path, fits: Any) -> None:
    """In whichever order they run."""

    class Built(Fake):
        name = "built"
        learner = Fake()

        def prepare(self, knowledge: Any) -> None:
            self._table = self.learner._table

    def created(name: str) -> Any:
        return Built() if name == "built" else create_attack(name)

    for place, attacks in (("one", ("fake", "built")), ("other", ("built", "fake"))):
        before = fits()
        report = run(tmp_path / place, attacks=attacks, create_attack=created)
        assert fits() - before == 2, "once at each cut"
        assert score(report, "built", 0).value == score(report, "fake", 0).value == 1.0
        assert len(list((tmp_path / place).glob("fitted/*.safetensors"))) == 2 * (1 + len(CONTROLS))


def test_what_was_learnt_is_kept(tmp_path: Path, fits: Any) -> None:
    first = run(tmp_path)
    (tmp_path / "rows.jsonl").unlink()
    second = run(tmp_path)
    assert fits() == 2
    assert [row.value for row in first.scores] == [row.value for row in second.scores]
    run(tmp_path, texts=["another text"])  # other victims, the same attackers
    assert fits() == 2
    path = next(tmp_path.glob("fitted/*.safetensors"))
    (tmp_path / "rows.jsonl").unlink()
    path.write_bytes(b"broken")
    broken = run(tmp_path)
    assert sum("delete it" in str(row.error) for row in broken.scores) == 1


def test_how_attackers_learnt_is_told_also_when_nothing_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitveil.attacks.learning.FIRST_CHECK", 8)
    asked: dict[str, Any] = {
        "cuts": (1,),
        "attacks": ("fake", "nearest", "mlp"),
        "steps": 20,
        "create_attack": lambda name: create_attack(name) if name in ATTACKS else create(name),
    }
    first = run(tmp_path, **asked).meta["learning"]
    nearest, mlp = first
    assert (nearest["attack"], nearest["cut"], nearest["defence"], nearest["steps"]) == ("nearest", 1, "none", None)
    assert nearest["queries"] == -(-16 * 257 // 48)  # every vocabulary entry sixteen times, in texts of 48
    assert mlp["steps"] == 20
    assert mlp["queries"] == 20 * 64 + 64 + 4  # the steps', one to measure the states by, and validation
    assert 0 <= mlp["halfway"] <= mlp["validation"] <= 1
    assert mlp["plateau"] is False
    assert json.loads(json.dumps(first)) == first
    assert run(tmp_path, **asked).meta["learning"] == first
    path = next(p for p in tmp_path.glob("fitted/*.safetensors") if "curve" in load_file(p))
    kept = load_file(path)
    save_file(kept, path, {"seconds": "1.5", "attack": "mlp"})  # as before these facts were kept
    old = run(tmp_path, **asked).meta["learning"][1]
    assert old == mlp | {"seconds": 1.5, "queries": None, "plateau": None, "rising": old["rising"]}
    path.write_bytes(b"broken")
    assert [one["attack"] for one in run(tmp_path, **asked).meta["learning"]] == ["nearest"]


def test_the_report_covers_earlier_runs_of_the_same_audit_only(tmp_path: Path) -> None:
    run(tmp_path, cuts=(0,))
    assert {row.cut for row in run(tmp_path, cuts=(2,)).rows} == {0, 2}
    other = run(tmp_path, cuts=(1,), texts=["another text"])
    assert {row.cut for row in other.rows} == {1}
    assert {text["cut"] for text in other.texts} == {1}


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"budget": 1.0},
        {"steps": 5},
        {"plateau": False},
        {"tokens": 11},
        {"texts": VICTIMS[:2]},
        {"shadow": SHADOW[:20]},
        {"cuts": (1,)},
        {"defences": ("hiding",)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_determines_a_row_is_in_its_key(tmp_path: Path, change: dict[str, Any]) -> None:
    first = run(tmp_path, cuts=(0,))
    asked = {"cuts": (0,)} | change
    second = run(tmp_path, **asked)
    assert second.meta["units"]["measured"] == UNITS, "nothing of the first run may pass for the second"
    assert not {row.key for row in first.rows} & {row.key for row in run(None, **asked).rows}


def test_another_model_or_version_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path)
    other = audit(
        tiny_model(1), TOKENIZER, VICTIMS, SHADOW, (0, 2), ("fake",), out=tmp_path, tokens=12, windows=20,
        create_attack=create_attack, create_defence=create_defence,
    )  # fmt: skip
    assert not {row.key for row in first.rows} & {row.key for row in other.rows}
    monkeypatch.setattr(Fake, "version", 2)
    third = run(tmp_path)
    assert third.meta["units"]["measured"] == 2
    assert len(third.scores) == 2 * UNITS


def test_failures_leave_error_rows_and_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = run(tmp_path, cuts=(0,), attacks=("thief", "exhausted", "short", "fake"))
    for name, said in (
        ("thief", "UndeclaredKnowledgeError: an attack asked for the prompts themselves"),
        ("exhausted", "OutOfMemoryError: out of memory"),
        ("short", "ConfigurationError: an attack answered with tokens (1, 1), expected (3, 12)"),
    ):
        row = score(report, name, 0)
        assert math.isnan(row.value)
        assert row.as_dict()["value"] is None
        assert str(row.error).startswith(said)
        assert "\n" not in str(row.error)
        assert len([r for r in report.rows if r.attack == name]) == 1
    assert score(report, "fake", 0).value == 1.0
    assert report.summary()["failed"] == 3
    monkeypatch.setitem(ATTACKS, "exhausted", type("Cured", (Fake,), {"name": "exhausted"}))
    again = run(tmp_path, cuts=(0,), attacks=("exhausted", "fake"))
    assert again.meta["units"]["measured"] == 1
    assert score(again, "exhausted", 0).error is None


def test_a_defence_that_fails_is_an_error_row_of_every_attack() -> None:
    report = run(cuts=(0,), defences=("failing", "none"))
    for name in (*CONTROLS, "fake"):
        assert "too wide" in str(score(report, name, 0, "failing").error)
    assert not report.valid
    assert report.meta["invalid"] == ["cut 0, defence failing: the control 'oracle' was not measured"]


def test_a_model_that_computes_nan_has_error_rows_and_no_low_scores() -> None:
    broken = tiny_model()
    with torch.no_grad():
        broken.model.layers[0].mlp.down_proj.weight[0, 0] = math.nan
    attacks = ("fake", "lens", "nearest", "ridge")
    report = audit(
        broken, TOKENIZER, VICTIMS, SHADOW, (0, 1), attacks, tokens=12, windows=20, create_defence=create_defence,
        create_attack=lambda name: create_attack(name) if name in ATTACKS else create(name),
    )  # fmt: skip
    for name in (*CONTROLS, *attacks):
        row = score(report, name, 1)
        assert math.isnan(row.value)
        assert str(row.error).startswith("NonFiniteError: a hidden state")
    assert not report.valid
    assert score(report, "fake", 0).value == 1.0  # before that block, all is well
    assert report.meta["prices"]["none"]["points"][1]["reason"].startswith("NonFiniteError")


def test_a_defect_in_an_attack_is_not_a_result(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        run(tmp_path, cuts=(0,), attacks=("fake", "defective"))
    assert run(tmp_path, cuts=(0,)).meta["units"]["measured"] == 0


def test_no_attack_but_the_control_is_given_the_prompts(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="'cheat' declares that it needs the prompts"):
        run(tmp_path / "out", attacks=("cheat",))
    assert not (tmp_path / "out").exists()


def test_a_report_whose_control_fails_is_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ATTACKS, "oracle", WrongCeiling)
    report = run(cuts=(0,))
    assert not report.valid
    assert report.summary()["invalid"] == ["cut 0, defence none: the control 'oracle' reached 0.970, expected 1.0"]


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"cuts": (0, 3)}, ConfigurationError, "cut 3 does not exist"),
        ({"cuts": ()}, ConfigurationError, "at least one cut"),
        ({"attacks": ("other",)}, ConfigurationError, "no attack 'other'"),
        ({"texts": []}, DataError, "no text"),
        ({"texts": ["  "]}, DataError, "no text"),
        ({"shadow": []}, DataError, "no text"),
        ({"tokens": 97}, DataError, "longer than the model's context"),
        ({"shadow": [*SHADOW, VICTIMS[1].upper()]}, DataError, "text 40 and prompt 1"),
        ({"prompts": 0}, ConfigurationError, "at least one prompt"),
        ({"windows": 0}, ConfigurationError, "one shadow window"),
        ({"budget": math.nan}, ConfigurationError, "positive number of seconds"),
        ({"seed": -1}, ConfigurationError, "seed"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        run(tmp_path / "out", **change)
    assert not (tmp_path / "out" / "rows.jsonl").exists()


def test_without_shadow_text_it_is_sampled_once(tmp_path: Path) -> None:
    report = run(tmp_path, shadow=None, cuts=(0,))
    assert "sampled from the model itself" in report.meta["shadow"]
    steps: list[Step] = []
    assert run(tmp_path, shadow=None, cuts=(0,), watch=steps.append).rows == report.rows
    assert not steps


def test_the_model_and_torch_stay_as_they_were() -> None:
    weights = {name: tensor.clone() for name, tensor in MODEL.state_dict().items()}
    MODEL.train()
    state = torch.get_rng_state()
    try:
        run(cuts=(1,), defences=("hiding",), shadow=None)
        assert MODEL.training
    finally:
        MODEL.eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[name], tensor) for name, tensor in MODEL.state_dict().items())


def test_knowledge_is_what_it_says() -> None:
    victims = take_victims(TOKENIZER, [Text(text) for text in VICTIMS], prompts=3, tokens=9, seed=0)
    shadow = Shadow(torch.ones(2, 9, dtype=torch.long), torch.ones(1, 9, dtype=torch.long))
    stage = Stage(MODEL, 1, create_defence("hiding", 7), victims, shadow)
    known = stage.knowledge().restricted(frozenset({Access.QUERIES, Access.HEAD, Access.WEIGHTS}))
    with pytest.raises(UndeclaredKnowledgeError):
        _ = known.truth
    assert (known.vocabulary, known.width) == (257, 32)
    tokens = victims.tokens.clamp(min=0)
    with torch.no_grad():
        hidden = MODEL.model(tokens, output_hidden_states=True, use_cache=False).hidden_states
        logits = MODEL(tokens).logits
        states: list[torch.Tensor] = []
        handle = MODEL.model.layers[-1].register_forward_hook(
            lambda module, args, output: states.append(output[0] if isinstance(output, tuple) else output)
        )
        MODEL(tokens)
        handle.remove()
        assert torch.allclose(known.head(states[0]), logits, atol=1e-5)
    asked = known.oracle(tokens).hidden
    assert not torch.equal(asked, stage.crossing.hidden), "a victim's noise must not come back for the attacker"
    assert known.oracle.sequences == 3
    again = Stage(MODEL, 1, create_defence("hiding", 7), victims, shadow)
    assert torch.equal(again.crossing.hidden, stage.crossing.hidden), "what crossed is the same when a run resumes"
    plain = Stage(MODEL, 1, create_defence("none", 0), victims, shadow).crossing
    assert torch.allclose(plain.hidden[plain.text], hidden[1][plain.text], atol=1e-5)


def test_prices_are_the_defences_and_not_the_attackers() -> None:
    report = run(cuts=(1,), defences=("none", "hiding", "failing"))
    victims = take_victims(TOKENIZER, [Text(text) for text in VICTIMS], prompts=3, tokens=12, seed=0)
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(
            MODEL(victims.tokens).logits[:, :-1].transpose(1, 2), victims.tokens[:, 1:], reduction="none"
        )
    prices = report.meta["prices"]
    plain, hidden, failed = (prices[name]["points"][0] for name in ("none", "hiding", "failing"))
    expected = losses.mean().exp().item()
    assert plain["undefended"] == pytest.approx(expected, rel=1e-4)
    assert plain["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert hidden["perplexity"] != pytest.approx(expected, rel=0.01)
    assert hidden["undefended"] == plain["undefended"]
    assert hidden["microseconds"] > 0
    assert prices["none"]["bytes_a_token"] == 32 * 4
    assert (plain["data"], plain["cut"], plain["reason"]) == ("texts", 1, "")
    assert failed["perplexity"] is failed["microseconds"] is None
    assert failed["reason"] == "ConfigurationError: too wide for this defence"
    assert json.loads(json.dumps(prices)) == prices


def test_an_encrypted_query_has_the_perplexity_of_the_whole_model_and_a_strange_width_has_none() -> None:
    class Wide(Hiding):
        def protect(self, crossing: Crossing) -> Crossing:
            return crossing.with_hidden(crossing.hidden.repeat(1, 1, 2))

    def create(spec: str, seed: int) -> Defence:
        return EncryptedQuery() if spec == "encrypted" else Wide(seed, 0.0) if spec == "wide" else Hiding(seed, 0.0)

    prices = run(cuts=(1,), defences=("none", "encrypted", "wide"), create_defence=create).meta["prices"]
    encrypted, wide = prices["encrypted"]["points"][0], prices["wide"]["points"][0]
    assert prices["encrypted"]["whole_model"]
    assert not prices["none"]["whole_model"]
    assert encrypted["perplexity"] == prices["none"]["points"][0]["perplexity"]
    assert encrypted["microseconds"] > 0
    assert prices["encrypted"]["bytes_a_token"] == 4 * EncryptedQuery().width(32)
    assert wide["perplexity"] is None
    assert "cannot read" in wide["reason"]
