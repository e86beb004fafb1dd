"""The personal part on the disk: what a run writes is what `personalised` puts back, and PEFT reads it, too."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from equivalence.support import random_model, tiny_llama
from equivalence.test_families import family_config
from peft import PeftModel
from safetensors.torch import load_file, save_file
from splitlearning_support import random_windows, sides
from torch import Tensor
from transformers import PreTrainedModel

from splitveil.adapters import load_adapter
from splitveil.errors import AdapterError, BaseModelError
from splitveil.split import cut
from splitveil.split.personal import ADAPTERS, CONFIG, WEIGHTS, personalised
from splitveil.splitlearning.course import Course
from splitveil.splitlearning.device import Device
from splitveil.splitlearning.interface import Plan, Shape, Trains
from splitveil.splitlearning.training import train

COURSE = Course(2, rate=1e-2, batch=4)


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return random_model(tiny_llama(num_hidden_layers=3, tie_word_embeddings=True))


def trained(base: PreTrainedModel, plan: Plan, folder: Path) -> tuple[Device, Path, Tensor]:
    windows = random_windows(base, 4, 8)
    device, cloud = sides(base, plan, folder / "cloud")
    outcome = train(device, cloud, windows, None, COURSE, folder / "device")
    assert outcome.personal == folder / "device" / "personal"
    return device, outcome.personal, windows


@pytest.fixture(scope="module")
def lora(base: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Device, Path, Tensor]:
    plan = Plan(2, Shape.U, Trains.LORA, Trains.LORA, rank=3, alpha=5.0, targets=("q_proj", "down_proj"))
    return trained(base, plan, tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def full(base: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Device, Path, Tensor]:
    plan = Plan(2, Shape.U, Trains.FULL, Trains.LORA)
    return trained(base, plan, tmp_path_factory.mktemp("full"))


def crossing(model: PreTrainedModel, block: int, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return cut(model, block).device(tokens).hidden


def logits(model: object, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_was_trained_comes_back(base: PreTrainedModel, kind: str, request: pytest.FixtureRequest) -> None:
    device, folder, tokens = request.getfixturevalue(kind)
    before = logits(base, tokens)
    model = personalised(base, folder)
    assert torch.equal(crossing(model, 2, tokens), device.crossing(tokens).hidden)
    assert not torch.allclose(crossing(base, 2, tokens), device.crossing(tokens).hidden, atol=1e-3)
    assert torch.equal(logits(base, tokens), before), "the base was changed"
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    own = {p.data_ptr() for p in base.parameters()}
    assert not own & {p.data_ptr() for p in model.parameters()}
    # What is above the cut is the base's, but for the norm and the head of full training in the U shape.
    for name, parameter in base.named_parameters():
        if ".layers.2." in name:
            found = dict(model.named_parameters())
            assert torch.equal(found.get(name, found.get(name.replace(".weight", ".base_layer.weight"))), parameter)


def test_adapters_are_an_ordinary_peft_folder(base: PreTrainedModel, lora: tuple[Device, Path, Tensor]) -> None:
    _, folder, tokens = lora
    peft = PeftModel.from_pretrained(random_model(base.config), folder).eval()
    assert torch.equal(logits(peft, tokens), logits(personalised(base, folder), tokens))
    adapter = load_adapter(folder)
    assert sorted(m.name for m in adapter.modules) == [
        f"model.layers.{block}.{module}" for block in (0, 1) for module in ("mlp.down_proj", "self_attn.q_proj")
    ]
    assert all(m.scale == pytest.approx(5 / 3) for m in adapter.modules)


@pytest.mark.parametrize(("family", "targets"), [("gpt2", ("c_attn",)), ("gpt_neox", ("query_key_value",))])
def test_families(family: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    base = random_model(family_config(family))
    for trains in (Trains.LORA, Trains.FULL):
        plan = Plan(1, Shape.U, trains, Trains.LORA, targets=targets)
        device, folder, tokens = trained(base, plan, tmp_path / trains)
        assert torch.equal(crossing(personalised(base, folder), 1, tokens), device.crossing(tokens).hidden)
        if trains is Trains.LORA:
            peft = PeftModel.from_pretrained(random_model(base.config), folder).eval()
            assert torch.equal(logits(peft, tokens), logits(personalised(base, folder), tokens))


def test_nothing_personal_is_not_written(base: PreTrainedModel, tmp_path: Path) -> None:
    plan = Plan(0, Shape.U, Trains.LORA, Trains.LORA)
    device, cloud = sides(base, plan, tmp_path / "cloud")
    outcome = train(device, cloud, random_windows(base, 4, 8), None, COURSE, tmp_path / "device")
    assert outcome.personal is None
    assert not (tmp_path / "device" / "personal").exists()


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def retensor(file: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file({name: t.contiguous() for name, t in change(load_file(file)).items()}, file)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
NORM = "model.norm.weight"
BAD_LORA: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no folder": (lambda p: [f.unlink() for f in p.iterdir()], AdapterError, "neither"),
    "both kinds": (lambda p: (p / WEIGHTS).write_bytes(b""), AdapterError, "both"),
    "no tensors file": (lambda p: (p / ADAPTERS).unlink(), AdapterError, "cannot be read"),
    "torn": (lambda p: (p / ADAPTERS).write_bytes((p / ADAPTERS).read_bytes()[:-9]), AdapterError, "damaged"),
    "no tensors": (lambda p: retensor(p / ADAPTERS, lambda t: {}), AdapterError, "no tensors"),
    "NaN": (lambda p: retensor(p / ADAPTERS, lambda t: t | {Q: t[Q] * torch.nan}), AdapterError, "not finite"),
    "integers": (lambda p: retensor(p / ADAPTERS, lambda t: t | {Q: t[Q].long()}), AdapterError, "not numbers"),
    "one half of a pair": (
        lambda p: retensor(p / ADAPTERS, lambda t: {k: v for k, v in t.items() if k != Q}),
        AdapterError,
        "one side only",
    ),
    "another shape": (lambda p: retensor(p / ADAPTERS, lambda t: t | {Q: t[Q][1:]}), BaseModelError, "does not fit"),
    "another rank": (lambda p: edit(p / CONFIG, r=4), BaseModelError, "does not fit"),
    "a rank of memory's end": (lambda p: edit(p / CONFIG, r=10**12), BaseModelError, "expected rank 1000000000000"),
    "alpha beyond floats": (lambda p: edit(p / CONFIG, lora_alpha=10**400), AdapterError, "lora_alpha a number"),
    "alpha of NaN": (lambda p: edit(p / CONFIG, lora_alpha=float("nan")), AdapterError, "lora_alpha a number"),
    "settings a thousand deep": (lambda p: (p / CONFIG).write_text(100_000 * "["), AdapterError, "RecursionError"),
    "rank of words": (lambda p: edit(p / CONFIG, r="4"), AdapterError, "whole number"),
    "a block that is not there": (
        lambda p: retensor(p / ADAPTERS, lambda t: {k.replace("layers.0", "layers.7"): v for k, v in t.items()}),
        BaseModelError,
        "does not have",
    ),
    "DoRA": (lambda p: edit(p / CONFIG, use_dora=True), AdapterError, "use_dora"),
    "ranks of its own": (lambda p: edit(p / CONFIG, rank_pattern={"q_proj": 2}), AdapterError, "rank_pattern"),
    "another kind": (lambda p: edit(p / CONFIG, peft_type="IA3"), AdapterError, "peft_type"),
    "settings torn": (lambda p: (p / CONFIG).write_text("{"), AdapterError, "damaged"),
    "settings of a list": (lambda p: (p / CONFIG).write_text("[]"), AdapterError, "damaged"),
}
BAD_FULL: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "torn": (lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes()[:-9]), AdapterError, "damaged"),
    "NaN": (lambda p: retensor(p / WEIGHTS, lambda t: t | {NORM: t[NORM] * torch.nan}), AdapterError, "not finite"),
    "another shape": (lambda p: retensor(p / WEIGHTS, lambda t: t | {NORM: t[NORM][1:]}), BaseModelError, "not fit"),
    "a name that is not there": (
        lambda p: retensor(p / WEIGHTS, lambda t: t | {"x": t[NORM] + 1}),
        BaseModelError,
        "does not have",
    ),
}


@pytest.mark.parametrize(("kind", "case"), [("lora", c) for c in BAD_LORA] + [("full", c) for c in BAD_FULL])
def test_bad_folders(
    base: PreTrainedModel, kind: str, case: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    _, folder, tokens = request.getfixturevalue(kind)
    spoil, error, message = (BAD_LORA if kind == "lora" else BAD_FULL)[case]
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    personalised(base, tmp_path)
    spoil(tmp_path)
    before = logits(base, tokens)
    with pytest.raises(error, match=message):
        personalised(base, tmp_path)
    assert torch.equal(logits(base, tokens), before)


def test_another_base_is_noticed(lora: tuple[Device, Path, Tensor], full: tuple[Device, Path, Tensor]) -> None:
    wider = random_model(tiny_llama(num_hidden_layers=3, hidden_size=128))
    for _, folder, _ in (lora, full):
        with pytest.raises(BaseModelError, match="does not fit"):
            personalised(wider, folder)
