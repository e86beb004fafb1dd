"""A personalised device under audit: whose states cross, what the attackers have, and what the report says of it."""

import dataclasses
import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from auditing_support import SHADOW, VICTIMS, Fake, create_attack, lora, save_tiny, tiny_model, tiny_tokenizer
from click.testing import CliRunner
from equivalence.support import random_model, random_prompts, tiny_llama
from safetensors.torch import save_file
from torch import Tensor

from splitveil.attacks.attack import Effort, Progress, Recovery, silent
from splitveil.attacks.catalogue import create
from splitveil.attacks.knowledge import Access, Knowledge, WhiteBox
from splitveil.attacks.search import Search
from splitveil.auditing.audit import audit
from splitveil.auditing.device import Devices
from splitveil.auditing.metrics import METRICS
from splitveil.auditing.outcome import Report
from splitveil.cli.audit import audit as command
from splitveil.defences.catalogue import create as create_defence
from splitveil.errors import ConfigurationError
from splitveil.split import Crossing, cut
from splitveil.split.personal import personalised

MODEL, TOKENIZER = tiny_model(), tiny_tokenizer()
CUT = 1


class Spy(Fake):
    """Keeps what it was handed."""

    name: ClassVar[str] = "spy"
    needs: ClassVar[frozenset[Access]] = frozenset(Access) - {Access.TRUTH}
    known: ClassVar[list[Knowledge]] = []
    crossings: ClassVar[list[Crossing]] = []

    def fit(self, knowledge: Knowledge, effort: Effort, progress: Progress) -> None:
        super().fit(knowledge, effort, progress)
        self.known.append(knowledge)

    def recover(self, crossing: Crossing, progress: Progress) -> Recovery:
        self.crossings.append(crossing)
        return super().recover(crossing, progress)

    def restore(self, state: Mapping[str, Tensor], knowledge: Knowledge) -> None:
        super().restore(state, knowledge)
        self.known.append(knowledge)


def attacks(name: str) -> Any:
    return Spy() if name == "spy" else create(name) if name in ("search", "gradient") else create_attack(name)


def run(out: Path | None = None, **changes: Any) -> Report:
    how: dict[str, Any] = {
        "shadow": SHADOW,
        "cuts": (CUT,),
        "attacks": ("spy",),
        "tokens": 12,
        "windows": 20,
        "budget": 1.0,
        "create_attack": attacks,
    }
    return audit(MODEL, TOKENIZER, VICTIMS, out=out, **(how | changes))


def spied(**changes: Any) -> tuple[Report, Knowledge, Crossing]:
    Spy.known.clear(), Spy.crossings.clear()
    report = run(**changes)
    (known,), (crossing,) = Spy.known, Spy.crossings
    return report, known, crossing


def sent(model: Any, crossing: Crossing, report: Report) -> Tensor:
    """What the device half of ``model`` sends for the prompts of an audit."""
    texts = {t["prompt_index"]: t["original"] for t in report.texts if t["attack"] == "spy"}
    assert len(texts) == len(crossing.mask)
    ids = [TOKENIZER(text, truncation=True, max_length=12)["input_ids"] for text in VICTIMS]
    with torch.no_grad():
        return cut(model, CUT).device(torch.tensor(ids)).hidden


@pytest.mark.parametrize("knows", ["base", "personal"])
def test_victims_run_the_personal_part_and_attackers_what_they_know(tmp_path: Path, knows: str) -> None:
    folder = lora(tmp_path / "mine", 0.3)
    report, known, crossing = spied(personal=folder, attacker_knows=knows)
    own = personalised(MODEL, folder)
    assert torch.allclose(crossing.hidden, sent(own, crossing, report), atol=1e-5)
    assert not torch.allclose(crossing.hidden, sent(MODEL, crossing, report), atol=1e-2)
    theirs = MODEL if knows == "base" else own
    asked = torch.randint(257, (2, 5))
    with torch.no_grad():
        expected = cut(theirs, CUT).device(asked).hidden
    assert torch.equal(known.oracle(asked).hidden, expected)
    assert torch.equal(known.white_box(asked).hidden, expected)
    assert known.embeddings is MODEL.get_input_embeddings().weight or torch.equal(
        known.embeddings, MODEL.get_input_embeddings().weight
    )
    assert {row.model for row in report.rows} == {f"{type(MODEL).__name__}+mine"}
    said = report.meta["attackers"]
    assert ("lack that part" in said) == (knows == "base")
    assert ("upper bound" in said) == (knows == "personal")
    page = html.unescape(report.to_html(tmp_path / "report").read_text())
    assert said in page


def test_the_head_is_the_public_one_and_the_cloud_its_own(tmp_path: Path) -> None:
    """A device half of whole weights has a head of its own, which attackers on the base do not get."""
    draw = torch.Generator().manual_seed(2)
    weights = {
        name: p + 0.2 * p.std() * torch.randn(p.shape, generator=draw)
        for name, p in MODEL.named_parameters()
        if "layers.1" not in name
    }
    folder = tmp_path / "full"
    folder.mkdir()
    save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()}, folder / "device.safetensors")
    own, states = personalised(MODEL, folder), torch.randn(3, 4, 32)
    for knows, theirs in (("base", MODEL), ("personal", own)):
        _, known, crossing = spied(personal=folder, attacker_knows=knows, training=True)
        with torch.no_grad():
            assert torch.allclose(known.head(states), theirs.lm_head(theirs.model.norm(states)), atol=1e-5)
            returned = known.cloud(crossing)
        assert crossing.gradient is not None
        # The device computed its gradient with its own head, whatever attackers know.
        leaf = returned.requires_grad_()
        logits = own.lm_head(own.model.norm(leaf))[:, :-1]
        ids = torch.tensor([TOKENIZER(text, truncation=True, max_length=12)["input_ids"] for text in VICTIMS])
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:])
        (expected,) = torch.autograd.grad(loss, leaf)
        assert torch.allclose(crossing.gradient, expected, atol=1e-6)


def test_every_difference_is_in_the_keys(tmp_path: Path) -> None:
    one, other = lora(tmp_path / "a" / "personal", 0.3), lora(tmp_path / "b" / "personal", 0.3, seed=1)
    ways: list[dict[str, Any]] = [
        {},
        {"training": True},
        {"personal": one},
        {"personal": other},
        {"personal": one, "attacker_knows": "personal"},
        {"personal": one, "training": True},
    ]
    reports = [run(tmp_path / "out", attacks=("fake",), **way) for way in ways]
    keys = [{row.key for row in report.rows} for report in reports]
    assert all(report.meta["units"]["measured"] == report.meta["units"]["asked"] for report in reports)
    assert sum(map(len, keys)) == len(set().union(*keys)), "a row of one setting passed for another's"
    again = run(tmp_path / "out", attacks=("fake",), personal=one)
    assert again.meta["units"]["measured"] == 0
    assert {row.key for row in again.rows} == keys[2]


def test_an_equal_personal_part_elsewhere_has_the_same_keys(tmp_path: Path) -> None:
    first = run(tmp_path / "out", attacks=("fake",), personal=lora(tmp_path / "a" / "personal", 0.3))
    (tmp_path / "b").mkdir()
    moved = (tmp_path / "a" / "personal").rename(tmp_path / "b" / "personal")
    assert {r.key for r in run(attacks=("fake",), personal=moved).rows} == {r.key for r in first.rows}


def test_the_folder_of_a_run_will_do(tmp_path: Path) -> None:
    part = lora(tmp_path / "mine" / "personal", 0.3)
    one, other = run(attacks=("fake",), personal=part), run(attacks=("fake",), personal=tmp_path / "mine")
    assert {row.key for row in one.rows} == {row.key for row in other.rows}
    assert {row.model for row in (*one.rows, *other.rows)} == {f"{type(MODEL).__name__}+mine"}


def test_attackers_who_lack_the_personal_part_learn_once_for_all_users(tmp_path: Path) -> None:
    one, other = lora(tmp_path / "one", 0.3), lora(tmp_path / "other", 0.3, seed=1)
    learnt = []
    for how in ({}, {"personal": one}, {"personal": other}, {"personal": one, "attacker_knows": "personal"}):
        run(tmp_path / "out", attacks=("fake",), **how)
        learnt.append(len(list((tmp_path / "out" / "fitted").glob("*.safetensors"))))
    assert learnt[0] == learnt[1] == learnt[2] < learnt[3]


@pytest.mark.parametrize("size", [1e-8, 1e-5, 1e-3, 0.03, 0.3])
def test_the_search_claims_nothing_that_is_wrong_where_the_device_is_another(tmp_path: Path, size: float) -> None:
    """Certified tokens are right, however far the victims' device half is from the one that is searched."""
    shape = tiny_llama()
    base = random_model(shape)
    own = personalised(base, lora(tmp_path / "personal", size, random_model(shape)))
    tokens = random_prompts(base, 6, 12)
    certified, right = {}, 0
    for spec in ("none", "int8", "int4", "gaussian:0.05"):
        protect = create_defence(spec, 0).protect
        white_box = WhiteBox(cut(base, CUT).device, protect)
        search = Search()
        search.fit(Knowledge(160, 64, frozenset({Access.WEIGHTS}), _white_box=white_box), Effort(seconds=10), silent)
        with torch.no_grad():
            crossing = protect(cut(own, CUT).device(tokens))
        found = search.recover(crossing, silent)
        sure = found.facts["certified"] == 1
        assert (found.tokens == tokens)[sure].all(), spec
        certified[spec] = int(sure.sum())
        right += int((found.tokens == tokens).sum())
    if size <= 1e-8:
        assert certified["none"] == certified["int8"] == tokens.numel(), "an equal device half is certain"
    if size >= 0.03:
        assert certified["none"] == 0, "another device half leaves doubt"
    if size <= 1e-3:
        assert right > 3 * tokens.numel(), "the nearest candidates are right all the same"


def test_gradients_are_attacked_in_an_audit(tmp_path: Path) -> None:
    folder = lora(tmp_path / "personal", 0.3)
    how: dict[str, Any] = {"attacks": ("gradient",), "defences": ("gaussian:5",), "create_defence": create_defence}
    report = run(tmp_path / "out", training=True, personal=folder, **how)
    (row,) = (row for row in report.scores if row.attack == "gradient")
    assert row.error is None
    assert row.value > 0.9, "the beginning token is not scored, and all others have a gradient before them"
    assert "GRADIENT CROSSES UNDEFENDED" in report.meta["attackers"]
    assert "GRADIENT CROSSES UNDEFENDED" in report.to_html(tmp_path / "report").read_text()
    (quiet,) = (row for row in run(**how).scores if row.attack == "gradient")
    assert "--training" in str(quiet.error)
    assert quiet.seconds < 1


def test_what_cannot_be_trained_on_has_error_rows() -> None:
    report = run(training=True, attacks=("fake",), defences=("encrypted",), create_defence=create_defence)
    assert all("the cloud cannot run on it" in str(row.error) for row in report.scores)
    assert not report.valid


def test_a_regularised_device_half_is_a_defence_that_attackers_know(tmp_path: Path) -> None:
    folder = lora(tmp_path / "regularised", 0.3)
    spec = f"regularised:{folder}"
    report, known, crossing = spied(defences=(spec,), create_defence=create_defence)
    own = personalised(MODEL, folder)
    assert torch.allclose(crossing.hidden, sent(own, crossing, report), atol=1e-5)
    asked = torch.randint(257, (2, 5))
    with torch.no_grad():
        assert torch.equal(known.oracle(asked).hidden, cut(own, CUT).device(asked).hidden)
    (row,) = (row for row in report.scores if row.attack == "spy")
    assert len(str(row.defence_params["digest"])) == 64
    assert "regularised" in report.meta["attackers"]

    ids = torch.tensor([TOKENIZER(text, truncation=True, max_length=12)["input_ids"] for text in VICTIMS])
    with torch.no_grad():
        losses = {
            name: torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:])
            for name, model in (("own", own), ("base", MODEL))
        }
    (point,) = report.meta["prices"][spec]["points"]
    assert point["perplexity"] == pytest.approx(losses["own"].exp().item(), rel=1e-4)
    assert point["undefended"] == pytest.approx(losses["base"].exp().item(), rel=1e-4)


def test_another_device_half_in_the_same_folder_is_measured_anew(tmp_path: Path) -> None:
    folder = lora(tmp_path / "regularised", 0.3)
    how: dict[str, Any] = {"defences": (f"regularised:{folder}",), "create_defence": create_defence}
    out = tmp_path / "out"
    first = run(out, attacks=("fake",), **how)
    lora(folder, 0.3, seed=5)
    second = run(out, attacks=("fake",), **how)
    assert second.meta["units"]["measured"] == second.meta["units"]["asked"]
    assert not {row.key for row in first.rows} & {row.key for row in second.rows}


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    for changes, words in (
        ({"attacker_knows": "personal"}, "give --personal"),
        ({"attacker_knows": "much"}, "'base' or 'personal'"),
        ({"personal": tmp_path / "nothing"}, "cannot be read"),
        ({"personal": tmp_path}, "holds no personal part"),
        ({"defences": ("regularised",), "create_defence": create_defence}, "needs a folder"),
        ({"defences": (f"regularised:{tmp_path}",), "create_defence": create_defence}, "holds no personal part"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            run(attacks=("fake",), **changes)


def test_a_public_device_has_nothing_to_say() -> None:
    assert Devices(MODEL).words(["none", "int8"]) == ""
    report = run(attacks=("fake",))
    assert report.meta["attackers"] == ""
    assert "personal part" not in json.dumps(dict(report.meta))
    plain = dataclasses.replace(report.scores[0], seconds=0)
    assert plain.metric == METRICS[-1]


def test_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(VICTIMS))
    (tmp_path / "shadow.txt").write_text("\n".join(SHADOW))
    options = {
        "model": save_tiny(tmp_path / "model"),
        "data": tmp_path / "prompts.txt",
        "shadow": tmp_path / "shadow.txt",
        "personal": lora(tmp_path / "mine", 0.3),
        "cut": CUT,
        "attack": "gradient",
        "tokens": 12,
        "windows": 20,
        "budget": 1,
        "out": tmp_path / "out",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    done = CliRunner().invoke(command, [*words, "--training"])
    assert done.exit_code == 0, done.output
    assert "model+mine" in done.output
    assert "attackers lack that part" in done.output
    assert "GRADIENT CROSSES UNDEFENDED" in done.output
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    (value,) = (r["value"] for r in rows if (r["attack"], r["metric"]) == ("gradient", METRICS[-1]))
    assert value > 0.9
    refused = CliRunner().invoke(command, [*words, "--attacker-knows", "everything"])
    assert refused.exit_code == 2
