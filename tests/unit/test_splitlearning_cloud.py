"""The cloud's side alone: what it refuses, and that a refusal leaves everything as it was."""

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from equivalence.support import random_model, tiny_llama
from splitlearning_support import own_weights, random_windows, sides
from torch import Tensor
from transformers import PreTrainedModel

from splitveil.errors import BaseModelError, ConfigurationError, RefusedError
from splitveil.split import Crossing
from splitveil.splitlearning.checks import NOTHING, Limits
from splitveil.splitlearning.cloud import LocalCloud
from splitveil.splitlearning.device import Device
from splitveil.splitlearning.halves import fingerprint
from splitveil.splitlearning.interface import Optimiser, Plan, Shape, Trains
from splitveil.splitlearning.loss import next_tokens

LORA = Trains.LORA
STRAIGHT = Plan(1, Shape.STRAIGHT, LORA, LORA, rank=2)
U = Plan(1, Shape.U, LORA, LORA, rank=2)
BATCH, LENGTH = 2, 8


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return random_model(tiny_llama(max_position_embeddings=24, tie_word_embeddings=True))


@pytest.fixture(scope="module")
def tokens(base: PreTrainedModel) -> Tensor:
    return random_windows(base, BATCH, LENGTH)


@pytest.fixture(scope="module")
def crossing(base: PreTrainedModel, tokens: Tensor) -> Crossing:
    return sides(base, U)[0].crossing(tokens)


def cloud_of(base: PreTrainedModel, plan: Plan, folder: Path | None = None) -> LocalCloud:
    return LocalCloud(base, cut=plan.cut, shape=plan.shape, plan=plan, folder=folder)


def changed(crossing: Crossing, value: float) -> Crossing:
    hidden = crossing.hidden.clone()
    hidden[1, 3, 5] = value
    return crossing.with_hidden(hidden)


def with_label(tokens: Tensor, value: int) -> Tensor:
    labels = next_tokens(tokens)
    labels[1, 2] = value
    return labels


def padded(crossing: Crossing) -> Crossing:
    mask = crossing.mask.clone()
    mask[0, :3] = 0
    return Crossing(crossing.hidden, mask)


# Name → (what is sent in place of a right micro-batch, what the refusal says).
BAD_STRAIGHT: dict[str, tuple[Callable[[LocalCloud, Crossing, Tensor], object], str]] = {
    "no labels": (lambda c, x, t: c.forward(x, None, 14.0), "needs labels"),
    "label of the vocabulary's size": (
        lambda c, x, t: c.forward(x, with_label(t, 160), 14.0),
        "outside the vocabulary",
    ),
    "label -1": (lambda c, x, t: c.forward(x, with_label(t, -1), 14.0), "outside the vocabulary"),
    "labels too short": (lambda c, x, t: c.forward(x, next_tokens(t)[:, 1:], 14.0), "one for each position"),
    "labels in int32": (lambda c, x, t: c.forward(x, next_tokens(t).int(), 14.0), "int64"),
    "labels of nothing": (lambda c, x, t: c.forward(x, torch.full_like(t, NOTHING), 14.0), "no position"),
    "label on padding": (lambda c, x, t: c.forward(padded(x), next_tokens(t), 14.0), "without text"),
    "normaliser 0": (lambda c, x, t: c.forward(x, next_tokens(t), 0.0), "normaliser"),
    "normaliser NaN": (lambda c, x, t: c.forward(x, next_tokens(t), math.nan), "normaliser"),
    "normaliser tiny": (lambda c, x, t: c.forward(x, next_tokens(t), 1e-300), "NaN or infinite"),
    "gradient beyond range": (lambda c, x, t: c.forward(x, next_tokens(t), 1e-25), "above"),
    "states NaN": (lambda c, x, t: c.forward(changed(x, math.nan), next_tokens(t), 14.0), "NaN or infinity"),
    "states infinite": (lambda c, x, t: c.forward(changed(x, math.inf), next_tokens(t), 14.0), "NaN or infinity"),
    "states in half": (lambda c, x, t: c.forward(x.with_hidden(x.hidden.half()), next_tokens(t), 14.0), "load both"),
    "states too narrow": (lambda c, x, t: c.forward(x.with_hidden(x.hidden[..., 1:]), next_tokens(t), 14.0), "63 wide"),
    "mask of 2": (lambda c, x, t: c.forward(Crossing(x.hidden, x.mask * 2), next_tokens(t), 14.0), "0 and 1"),
    "mask of floats": (lambda c, x, t: c.forward(Crossing(x.hidden, x.mask.float()), next_tokens(t), 14.0), "0 and 1"),
    "padding only": (lambda c, x, t: c.forward(Crossing(x.hidden, x.mask * 0), next_tokens(t), 14.0), "padding only"),
    "no texts": (lambda c, x, t: c.forward(x.rows(0, 0), next_tokens(t[:0]), 14.0), "at least one"),
    "earlier positions": (
        lambda c, x, t: c.forward(Crossing(x.hidden, torch.ones(BATCH, 9).long()), next_tokens(t), 14.0),
        "mask covers 9",
    ),
    "past the context": (
        lambda c, x, t: c.forward(
            Crossing(x.hidden.repeat(1, 4, 1), x.mask.repeat(1, 4)), next_tokens(t.repeat(1, 4)), 14.0
        ),
        "past the model's 24",
    ),
    "gradient without a micro-batch": (lambda c, x, t: c.backward(x.hidden), "forward comes first"),
    "step of NaN": (lambda c, x, t: c.step(math.nan), "learning rate"),
    "step backwards": (lambda c, x, t: c.step(-0.1), "learning rate"),
    "checkpoint in the midst of a step": (lambda c, x, t: c.save(0), "between steps"),
    "evaluation without labels": (lambda c, x, t: c.evaluate(x, None), "needs labels"),
    "evaluation of NaN": (lambda c, x, t: c.evaluate(changed(x, math.nan), next_tokens(t)), "NaN or infinity"),
    "generation of NaN": (lambda c, x, t: c.extend(changed(x, math.nan)), "NaN or infinity"),
}


@pytest.mark.parametrize("case", BAD_STRAIGHT)
def test_what_is_refused_changes_nothing(
    base: PreTrainedModel, tokens: Tensor, crossing: Crossing, case: str, tmp_path: Path
) -> None:
    """Three good micro-batches and a bad one between them: the step is that of the good ones alone, to the last bit."""
    send, message = BAD_STRAIGHT[case]

    def run(bad: bool) -> dict[str, Tensor]:
        cloud = cloud_of(base, STRAIGHT, tmp_path)
        for index in range(3):
            if bad and index == 2:
                with pytest.raises(RefusedError, match=message):
                    send(cloud, crossing, tokens)
            cloud.forward(crossing, next_tokens(tokens), 42.0)
        cloud.step(1e-2)
        return {name: p.detach().clone() for name, p in cloud._own.parameters.items()}

    good, interrupted = run(False), run(True)
    assert all(torch.equal(good[name], interrupted[name]) for name in good)
    assert any(p.abs().max() > 1e-3 for name, p in good.items() if "lora_B" in name)


BAD_U: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "NaN": (lambda g: g * math.nan, "NaN or infinity"),
    "infinite": (lambda g: g + math.inf, "NaN or infinity"),
    "beyond range": (lambda g: g + 1e30, "above|NaN or infinite"),
    "of other shape": (lambda g: g[:, 1:], "expected"),
    "in half": (lambda g: g.half(), "expected"),
}


@pytest.mark.parametrize("case", BAD_U)
def test_a_bad_gradient_drops_its_micro_batch_only(
    base: PreTrainedModel, tokens: Tensor, crossing: Crossing, case: str
) -> None:
    spoil, message = BAD_U[case]

    def run(bad: bool) -> dict[str, Tensor]:
        cloud = cloud_of(base, U)
        for index in range(3):
            if bad and index == 2:
                hidden, _ = cloud.forward(crossing, None, 42.0)
                with pytest.raises(RefusedError, match=message):
                    cloud.backward(spoil(torch.ones_like(hidden)))
                with pytest.raises(RefusedError, match="forward comes first"):
                    cloud.backward(torch.ones_like(hidden))
            hidden, loss = cloud.forward(crossing, None, 42.0)
            assert math.isnan(loss)
            cloud.backward(hidden / 100)
        cloud.step(1e-2)
        return {name: p.detach().clone() for name, p in cloud._own.parameters.items()}

    good, interrupted = run(False), run(True)
    assert all(torch.equal(good[name], interrupted[name]) for name in good)


def test_order_of_calls(base: PreTrainedModel, tokens: Tensor, crossing: Crossing, tmp_path: Path) -> None:
    cloud = cloud_of(base, U, tmp_path)
    with pytest.raises(RefusedError, match="at least one micro-batch"):
        cloud.step(1e-2)
    with pytest.raises(RefusedError, match="stay on the device"):
        cloud.forward(crossing, next_tokens(tokens), 14.0)
    cloud.forward(crossing, None, 14.0)
    for early in (lambda: cloud.forward(crossing, None, 14.0), lambda: cloud.step(1e-2)):
        with pytest.raises(RefusedError, match="has not come"):
            early()
    with pytest.raises(RefusedError, match="between steps"):
        cloud.save(0)
    cloud.discard()
    with pytest.raises(RefusedError, match="at least one micro-batch"):
        cloud.step(1e-2)
    cloud.save(0)
    with pytest.raises(RefusedError, match="0 steps were made here, and 1"):
        cloud.save(1)
    cloud.close()
    cloud.close()


def test_a_session_without_a_plan_does_not_train(base: PreTrainedModel, crossing: Crossing) -> None:
    cloud = LocalCloud(base, cut=1, shape=Shape.U)
    calls: list[Callable[[], object]] = [
        lambda: cloud.forward(crossing, None, 1.0),
        lambda: cloud.backward(crossing.hidden),
        lambda: cloud.step(1e-3),
        lambda: cloud.save(0),
        lambda: cloud.resume([3]),
    ]
    for call in calls:
        with pytest.raises(RefusedError, match="without a plan"):
            call()
    hidden, loss = cloud.evaluate(crossing, None)
    assert hidden is not None
    assert math.isnan(loss)
    with pytest.raises(RefusedError, match="no checkpoints"):
        cloud_of(base, U).save(0)


def test_limits_of_a_call_and_of_a_cache(base: PreTrainedModel, crossing: Crossing) -> None:
    cloud = LocalCloud(base, cut=1, shape=Shape.U, limits=Limits(batch=2, states=17))
    with pytest.raises(RefusedError, match="smaller batches"):
        cloud.evaluate(Crossing(crossing.hidden.repeat(2, 1, 1), crossing.mask.repeat(2, 1)), None)
    cloud.extend(crossing)
    more = Crossing(crossing.hidden[:, :1], torch.ones(BATCH, LENGTH + 1).long())
    with pytest.raises(RefusedError, match="17 positions together"):
        cloud.extend(more)  # 2 texts of 9 positions, the cache's included
    with pytest.raises(RefusedError, match="1 texts go on where 2 began"):
        cloud.extend(more.rows(0, 1))
    with pytest.raises(RefusedError, match="8 earlier"):
        cloud.extend(crossing)
    cloud.restart()
    cloud.extend(crossing)


def test_a_limit_of_pairs(base: PreTrainedModel, crossing: Crossing) -> None:
    """Attention is between positions: its memory grows with their product."""
    pairs = BATCH * LENGTH * LENGTH
    LocalCloud(base, cut=1, shape=Shape.U, limits=Limits(pairs=pairs)).extend(crossing)
    cloud = LocalCloud(base, cut=1, shape=Shape.U, limits=Limits(pairs=pairs - 1))
    for call in (cloud.extend, lambda c: cloud.evaluate(c, None)):
        with pytest.raises(RefusedError, match="8 positions that attend to 8 are more than this cloud takes at once"):
            call(crossing)


def test_a_limit_of_logits(base: PreTrainedModel, tokens: Tensor, crossing: Crossing) -> None:
    labels, logits = next_tokens(tokens), BATCH * LENGTH * 160
    for limit in (logits - 1, logits):
        limits = Limits(logits=limit)
        cloud = LocalCloud(base, cut=1, shape=Shape.STRAIGHT, plan=STRAIGHT, limits=limits)
        for call in (lambda c: c.forward(crossing, labels, 14.0), lambda c: c.evaluate(crossing, labels)):
            if limit == logits:
                call(cloud)
                continue
            with pytest.raises(RefusedError, match="more logits than this cloud computes at once"):
                call(cloud)
        # Where the head is on the device, none are computed here.
        LocalCloud(base, cut=1, shape=Shape.U, limits=limits).evaluate(crossing, None)


def test_a_loss_that_is_too_large_to_be_told(base: PreTrainedModel, tokens: Tensor, crossing: Crossing) -> None:
    """A cloud that trains nothing accumulates no gradient that could be too large, and the states' one is finite."""
    cloud = cloud_of(base, dataclasses.replace(STRAIGHT, cloud=Trains.NOTHING))
    with pytest.raises(RefusedError, match="the loss became"):
        cloud.forward(crossing, next_tokens(tokens), 1e-37)
    assert cloud._own.batches == 0


def test_a_gradient_that_overflows_on_its_way_down(base: PreTrainedModel, crossing: Crossing) -> None:
    """As the loss: nothing is trained in the cloud that would notice."""
    cloud = cloud_of(base, dataclasses.replace(U, cloud=Trains.NOTHING))
    hidden, _ = cloud.forward(crossing, None, 14.0)
    with pytest.raises(RefusedError, match="gradient by the states became NaN or infinite"):
        cloud.backward(torch.full_like(hidden, 3.4e38))
    assert cloud._own.batches == 0


def test_a_decay_that_makes_weights_larger(base: PreTrainedModel, crossing: Crossing) -> None:
    """States and gradients of zero betray nothing of it: without the refusal weights are infinite after 40 steps."""
    plan = dataclasses.replace(U, device=Trains.FULL, cloud=Trains.FULL, optimiser=Optimiser(weight_decay=9.0))
    cloud, zeros = cloud_of(base, plan), crossing.with_hidden(torch.zeros_like(crossing.hidden))
    before = {name: p.detach().clone() for name, p in cloud._own.parameters.items()}

    def learn() -> None:
        hidden, _ = cloud.forward(zeros, None, 14.0)
        cloud.backward(torch.zeros_like(hidden))

    refused = 0
    for _ in range(45):
        learn()
        try:
            cloud.step(1.0)
        except RefusedError as error:
            refused += "product is at most 1" in str(error)
    assert refused == 45
    assert all(torch.equal(before[name], p) for name, p in cloud._own.parameters.items())
    cloud.step(1 / 9)
    assert all(p.abs().max() < 1e-6 for p in cloud._own.parameters.values())


def test_upper_blocks_that_explode(base: PreTrainedModel, crossing: Crossing) -> None:
    """Finite states in, infinite ones out: they are told as that, and nothing waits for a gradient."""
    huge = copy.deepcopy(base)
    for layer in huge.model.layers:
        layer.mlp.down_proj.weight.data.fill_(3e38)
    cloud = cloud_of(huge, U)
    for call in (lambda: cloud.forward(crossing, None, 14.0), lambda: cloud.evaluate(crossing, None)):
        with pytest.raises(RefusedError, match="a hidden state became"):
            call()
    with pytest.raises(RefusedError, match="forward comes first"):
        cloud.backward(crossing.hidden)
    with pytest.raises(RefusedError, match="texts have to begin anew"):
        cloud.extend(crossing)


def test_sessions_on_one_base_do_not_meet(base: PreTrainedModel, tokens: Tensor, crossing: Crossing) -> None:
    before = fingerprint(base)
    first, second, full = cloud_of(base, U), cloud_of(base, U), cloud_of(base, Plan(1, Shape.U, LORA, Trains.FULL))
    untouched, _ = second.evaluate(crossing, None)
    for cloud in (first, full):
        hidden, _ = cloud.forward(crossing, None, 1.0)
        cloud.backward(hidden)
        cloud.step(1e-1)
        after, _ = cloud.evaluate(crossing, None)
        assert after is not None
        assert untouched is not None
        assert not torch.allclose(after, untouched, atol=1e-2)
    again, _ = second.evaluate(crossing, None)
    assert again is not None
    assert torch.equal(again, untouched)
    assert fingerprint(base) == before
    shared = {p.data_ptr() for p in base.parameters()}
    assert all(p.data_ptr() in shared for p in second._middle.parameters() if not p.requires_grad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": ("nonsense",)}, "nonsense"),
        ({"targets": ("q_proj", "lm_head")}, "outside"),
        ({"cut": 3}, "cut 3 does not exist"),
        ({"optimiser": Optimiser(epsilon=0.0)}, "epsilon"),
    ],
)
def test_plans_that_this_model_cannot_follow(base: PreTrainedModel, change: dict[str, object], message: str) -> None:
    plan = dataclasses.replace(U, **change)
    for side in (Device, LocalCloud):
        with pytest.raises(ConfigurationError, match=message):
            side(base, cut=plan.cut, shape=plan.shape, plan=plan)


def test_half_precision_is_not_trained_in_full(base: PreTrainedModel) -> None:
    half = random_model(tiny_llama(), dtype=torch.float16)
    with pytest.raises(ConfigurationError, match="float16"):
        cloud_of(half, Plan(1, Shape.U, Trains.FULL, Trains.NOTHING))
    with pytest.raises(ConfigurationError, match="plan"):
        LocalCloud(base, cut=2, shape=Shape.U, plan=U)
    with pytest.raises(ConfigurationError, match="shape"):
        LocalCloud(base, cut=1, shape=Shape.STRAIGHT, plan=U)
    model = random_model(tiny_llama())
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(BaseModelError):
        LocalCloud(model, cut=1, shape=Shape.U)


def test_a_fingerprint_tells_models_apart(base: PreTrainedModel) -> None:
    other = random_model(base.config, seed=1)
    assert fingerprint(base) == fingerprint(random_model(base.config)) != fingerprint(other)
    assert fingerprint(random_model(base.config, dtype=torch.bfloat16)) != fingerprint(base)


def test_no_weight_in_the_text_of_a_side(base: PreTrainedModel) -> None:
    device, cloud = sides(base, U)
    assert own_weights(device, cloud)
    for side in (device, cloud, device.own):
        assert "tensor(" not in repr(side)
        assert len(repr(side)) < 200
