"""The device's side alone: defences, a regulariser, and answers of a cloud that is wrong."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from equivalence.support import random_model, tiny_llama
from splitlearning_support import random_windows, sides, split_steps
from torch import Tensor
from transformers import PreTrainedModel

from splitveil.defences.catalogue import create
from splitveil.defences.regularise import DistanceCorrelation
from splitveil.errors import ConfigurationError, DataError, NonFiniteError, ProtocolError
from splitveil.split import Crossing, cut
from splitveil.splitlearning.cloud import LocalCloud
from splitveil.splitlearning.course import Course, Decay
from splitveil.splitlearning.data import hold_out, make_windows, rows_of_step
from splitveil.splitlearning.device import Device
from splitveil.splitlearning.interface import Plan, Shape, Trains
from splitveil.splitlearning.loss import next_tokens, summed_loss

LORA = Trains.LORA
PLANS = {
    "u": Plan(1, Shape.U, LORA, LORA, rank=2),
    "straight": Plan(1, Shape.STRAIGHT, LORA, LORA, rank=2),
    "u-full": Plan(1, Shape.U, Trains.FULL, LORA),
}


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return random_model(tiny_llama())


@pytest.fixture(scope="module")
def tokens(base: PreTrainedModel) -> Tensor:
    return random_windows(base, 3, 10)


def test_the_encrypted_layer_is_refused_by_name(base: PreTrainedModel) -> None:
    with pytest.raises(ConfigurationError, match=r"splitveil serve.*splitveil generate"):
        Device(base, cut=1, shape=Shape.U, defence=create("encrypted"))


def test_a_defence_that_is_in_the_weights_is_refused(base: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "device.safetensors").write_bytes(b"weights")
    with pytest.raises(ConfigurationError, match=r"--regularise.*--personal"):
        Device(base, cut=1, shape=Shape.U, defence=create(f"regularised:{tmp_path}"))


@pytest.mark.parametrize("shape", ["u", "straight"])
@pytest.mark.parametrize(
    "spec", ["none", "int8", "int4", "bfloat16", "topk:0.5", "gaussian:0.1", "dchi:20", "permutation"]
)
def test_gradients_through_a_defence(base: PreTrainedModel, tokens: Tensor, spec: str, shape: str) -> None:
    """What one micro-batch accumulates = the gradient of one ordinary graph through both halves and the defence.

    The rounding defences have the identity's gradient, written here as ``h + (rounded - h).detach()``.
    """
    plan, labels, normaliser = PLANS[shape], next_tokens(tokens), 27.0
    device, cloud = sides(base, plan, defence=create(spec, seed=5))
    loss = device.learn(cloud, tokens, labels, normaliser)

    other, above = sides(base, plan)
    defence = create(spec, seed=5)
    with torch.enable_grad():
        crossing = other._half(tokens)
        if spec in ("int8", "int4", "bfloat16"):
            hidden = crossing.hidden + (defence.protect(crossing).hidden - crossing.hidden).detach()
        else:
            hidden = defence.protect(crossing).hidden
        states = above._middle(crossing.with_hidden(hidden))
        tail = other._tail if shape == "u" else above._tail
        assert tail is not None
        expected = summed_loss(tail(Crossing(states, crossing.mask)), labels) / normaliser
        parameters = [*other.own.list, *above._own.list]
        gradients = torch.autograd.grad(expected, parameters)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for got, wanted in zip([*device.own._sums, *cloud._own._sums], gradients, strict=True):
        assert got is not None
        assert torch.allclose(got, wanted, rtol=1e-3, atol=1e-5 * wanted.abs().max().item())
    assert any(g.abs().max() > 0 for g in device.own._sums if g is not None)


def test_what_crosses_is_protected(base: PreTrainedModel, tokens: Tensor) -> None:
    """In training, in evaluation and in generation: the cloud sees the defended states and no others."""
    for spec in ("int4", "topk:0.25"):
        device, cloud = sides(base, PLANS["u"], defence=create(spec))
        seen: list[Crossing] = []
        for name in ("forward", "evaluate", "extend"):
            real = getattr(cloud, name)

            def spy(
                crossing: Crossing, *args: object, real: Callable[..., object] = real, seen: list[Crossing] = seen
            ) -> object:
                seen.append(crossing)
                return real(crossing, *args)

            setattr(cloud, name, spy)
        device.learn(cloud, tokens, next_tokens(tokens), 27.0)
        device.evaluate(cloud, tokens, next_tokens(tokens))
        device.next_logits(cloud, tokens, torch.ones_like(tokens), device.new_cache())
        assert len(seen) == 3
        plain = cut(base, 1).device(tokens)
        for crossing in seen:
            assert not crossing.hidden.requires_grad
            assert not torch.allclose(crossing.hidden, plain.hidden, atol=1e-3)
            assert torch.allclose(crossing.hidden, create(spec).protect(plain).hidden, atol=1e-5)


def test_labels_stay_on_the_device_in_the_u_shape(base: PreTrainedModel, tokens: Tensor) -> None:
    device, cloud = sides(base, PLANS["u"])
    told: list[object] = []
    for name in ("forward", "evaluate"):
        real = getattr(cloud, name)

        def spy(crossing: Crossing, labels: object, *args: object, real: Callable[..., object] = real) -> object:
            told.append(labels)
            return real(crossing, labels, *args)

        setattr(cloud, name, spy)
    device.learn(cloud, tokens, next_tokens(tokens), 27.0)
    device.evaluate(cloud, tokens, next_tokens(tokens))
    assert told == [None, None]


@pytest.mark.parametrize("shape", PLANS)
def test_evaluation_is_the_whole_models(base: PreTrainedModel, tokens: Tensor, shape: str) -> None:
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    labels = next_tokens(tokens, mask)
    assert int((labels != -100).sum()) == 5 + 9 + 9
    with torch.no_grad():
        logits = base(input_ids=tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    device, cloud = sides(base, PLANS[shape])
    assert device.evaluate(cloud, tokens, labels, mask) == pytest.approx(summed_loss(logits, labels).item(), rel=1e-5)


def test_a_regulariser_is_added_to_the_devices_loss(base: PreTrainedModel, tokens: Tensor) -> None:
    """The gradient with it minus that without it = the penalty's own, by the micro-batch's share of the tokens."""
    plan, labels = PLANS["u"], next_tokens(tokens)
    regulariser = DistanceCorrelation(3.0)
    sums = []
    for given in (None, regulariser):
        device, cloud = sides(base, plan, regulariser=given)
        with torch.no_grad():
            for parameter in device.own.list:
                parameter.add_(0.05)  # B is 0 in the beginning, and A has no gradient then
        sums.append((device.learn(cloud, tokens, labels, 54.0), device.own._sums))
    with torch.enable_grad():
        crossing = device._half(tokens)
        embeddings = base.get_input_embeddings()(tokens)
        penalty = regulariser.penalty(embeddings, crossing.hidden, crossing.text)
        gradients = torch.autograd.grad(3.0 * penalty * 27 / 54, device.own.list)
    (plain, without), (reported, with_it) = sums
    assert reported == pytest.approx(plain)
    for a, b, wanted in zip(with_it, without, gradients, strict=True):
        assert a is not None
        assert b is not None
        assert wanted.abs().max() > 0
        assert torch.allclose(a - b, wanted, rtol=1e-2, atol=1e-4 * wanted.abs().max().item())


def test_a_regulariser_lowers_its_penalty(base: PreTrainedModel) -> None:
    windows = random_windows(base, 8, 10)
    course = Course(12, rate=1e-2, batch=8)
    penalties = []
    for given in (None, DistanceCorrelation(20.0)):
        plan = PLANS["u"]
        device, cloud = sides(base, plan, regulariser=given)
        for step in range(course.steps):
            device.learn(cloud, windows, next_tokens(windows), 72.0)
            cloud.step(course.rate_of(step))
            device.step(course.rate_of(step))
        crossing = device.crossing(windows)
        embeddings = base.get_input_embeddings()(windows)
        penalties.append(DistanceCorrelation(1.0).penalty(embeddings, crossing.hidden, crossing.text).item())
    assert penalties[1] < 0.8 * penalties[0]


class _WrongCloud(LocalCloud):
    """A cloud whose answers are spoilt on their way."""

    def __init__(self, *args: object, spoil: Callable[[Tensor], object], **more: object) -> None:
        super().__init__(*args, **more)  # type: ignore[arg-type]
        self.spoil = spoil

    def forward(self, *args: object) -> object:  # type: ignore[override]
        answer, loss = super().forward(*args)  # type: ignore[arg-type]
        return self.spoil(answer), loss

    def extend(self, crossing: Crossing) -> object:  # type: ignore[override]
        return self.spoil(super().extend(crossing))


SPOILT: dict[str, tuple[Callable[[Tensor], object], type[Exception]]] = {
    "NaN": (lambda t: t * math.nan, NonFiniteError),
    "too narrow": (lambda t: t[..., 1:], ProtocolError),
    "integers": (lambda t: t.long(), ProtocolError),
    "nothing": (lambda t: None, ProtocolError),
}


@pytest.mark.parametrize("shape", ["u", "straight"])
@pytest.mark.parametrize("case", SPOILT)
def test_wrong_answers(base: PreTrainedModel, tokens: Tensor, case: str, shape: str) -> None:
    spoil, error = SPOILT[case]
    plan = PLANS[shape]
    device, _ = sides(base, plan)
    cloud = _WrongCloud(base, cut=1, shape=plan.shape, plan=plan, spoil=spoil)
    with pytest.raises(error):
        device.learn(cloud, tokens, next_tokens(tokens), 27.0)  # type: ignore[arg-type]
    assert device.own.batches == 0
    with pytest.raises(error):
        device.next_logits(cloud, tokens, torch.ones_like(tokens), device.new_cache())  # type: ignore[arg-type]


def test_training_with_a_coarse_crossing_learns(base: PreTrainedModel) -> None:
    windows = random_windows(base, 8, 10)
    for spec in ("int4", "topk:0.5"):
        run = split_steps(base, PLANS["u-full"], windows, Course(8, rate=1e-2, batch=8), defence=create(spec))
        assert run.losses[-1] < 0.8 * run.losses[0]


# Data and courses.


class Letters:
    """A tokenizer of letters."""

    eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) - 96 for letter in text]}


def test_windows_hold_every_document_once() -> None:
    texts = ["abc", "de", "fghij", "kl"]
    windows = make_windows(Letters(), texts, 4, seed=3)
    assert windows.shape == (4, 4)
    said = "".join(" " if i == 0 else chr(i + 96) for i in windows.flatten().tolist())
    assert sorted(said.split(), key=texts.index) == texts
    assert said.split() != texts
    assert torch.equal(windows, make_windows(Letters(), texts, 4, seed=3))
    assert not torch.equal(windows, make_windows(Letters(), texts, 4, seed=4))
    with pytest.raises(DataError, match="16 tokens long"):
        make_windows(Letters(), texts, 17)
    with pytest.raises(ConfigurationError):
        make_windows(Letters(), texts, 1)


def test_every_epoch_holds_every_window_once_in_another_order() -> None:
    seen = [row for step in range(15) for row in rows_of_step(10, step, 4, seed=1)]
    epochs = [seen[start : start + 10] for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert rows_of_step(10, 7, 4, seed=1) == seen[28:32]
    assert rows_of_step(10, 7, 4, seed=2) != seen[28:32]


def test_held_out_windows() -> None:
    windows = torch.arange(20).view(10, 2)
    learnt, held = hold_out(windows, 0.25)
    assert held is not None
    assert torch.equal(torch.cat([learnt, held]), windows)
    assert len(held) == 2
    assert hold_out(windows, 0)[1] is None
    with pytest.raises(DataError, match="too few"):
        hold_out(windows[:1], 0.1)
    with pytest.raises(ConfigurationError):
        hold_out(windows, 1.0)


def test_learning_rates() -> None:
    constant = Course(10, rate=0.4, warmup=4)
    assert [round(constant.rate_of(step), 6) for step in range(6)] == [0.1, 0.2, 0.3, 0.4, 0.4, 0.4]
    cosine = Course(8, rate=0.4, warmup=4, decay=Decay.COSINE)
    assert cosine.rate_of(4) == pytest.approx(0.4)
    assert cosine.rate_of(6) == pytest.approx(0.2)
    assert 0 < cosine.rate_of(7) < 0.1
    for wrong in ({"steps": 0}, {"batch": 0}, {"rate": 0.0}, {"rate": math.nan}, {"warmup": -1}, {"seed": -1}):
        with pytest.raises(ConfigurationError):
            Course(**({"steps": 3} | wrong))  # type: ignore[arg-type]
