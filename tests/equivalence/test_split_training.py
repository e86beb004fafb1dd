"""Split training = ordinary training of the whole model, at every cut, for whatever is trained.

Measured, with the windows below: in one micro-batch a step all weights are equal to the last bit, for both sides
multiply the same matrices; a loss differs by 3e-7 of itself, for the mean is taken of a sum that was added up
elsewhere. Accumulated micro-batches are added up in another order: 9e-7 of a loss, and 1.8e-5 of a weight after steps
that move weights by thousandths. The limits leave one order of magnitude for other processors.
"""

from pathlib import Path

import pytest
import torch
from splitlearning_support import (
    EMBEDDED,
    Run,
    load_base,
    random_windows,
    split_run,
    split_steps,
    unsplit_run,
)
from torch import Tensor
from transformers import PreTrainedModel

from equivalence.support import NO_SHARED, SHARED, random_model, tiny_llama
from equivalence.test_families import FAMILIES, family_config
from splitveil.errors import ConfigurationError
from splitveil.split import Crossing, cut_in_three
from splitveil.split.blocks import find_blocks
from splitveil.splitlearning.course import Course, Decay
from splitveil.splitlearning.interface import Optimiser, Plan, Shape, Trains

LOSS, WEIGHT, ACCUMULATED = 1e-5, 1e-6, 1e-4
L, N, F = Trains.LORA, Trains.NOTHING, Trains.FULL

# Shape, what the device and the cloud train, whether the embeddings stay as they are, the learning rate.
MODES = {
    "lora": (Shape.U, L, L, False, 3e-3),
    "lora-on-the-device": (Shape.U, L, N, False, 3e-3),
    "lora-in-the-cloud": (Shape.U, N, L, False, 3e-3),
    "full": (Shape.U, F, F, False, 1e-3),
    "full-below-lora-above": (Shape.U, F, L, False, 1e-3),
    "straight-lora": (Shape.STRAIGHT, L, L, False, 3e-3),
    "straight-full-frozen-embeddings": (Shape.STRAIGHT, F, F, True, 1e-3),
}
ONE_SIDED = ("lora-in-the-cloud", "full-below-lora-above")


def plan_of(mode: str, cut: int, **more: object) -> tuple[Plan, float]:
    shape, device, cloud, frozen, rate = MODES[mode]
    return Plan(cut, shape, device, cloud, rank=4, freeze_embeddings=frozen, **more), rate


@pytest.fixture(scope="module", params=["stories3M", "embedded"])
def trained_base(request: pytest.FixtureRequest) -> PreTrainedModel:
    if request.param == "embedded":
        return load_base(EMBEDDED)
    folder = SHARED / "models" / request.param
    if not folder.is_dir():
        pytest.skip(NO_SHARED)
    return load_base(folder)


@pytest.fixture(scope="module")
def references(trained_base: PreTrainedModel) -> dict[object, Run]:
    """Unsplit runs by what they depend on: not by the cut, where both sides train the same."""
    return {}


def check(run: Run, reference: Run, weight: float, base: PreTrainedModel) -> None:
    """Equal to ``reference``, and not for want of learning."""
    loss_apart, weight_apart = run.distance(reference)
    assert loss_apart <= LOSS, f"losses {run.losses}, expected {reference.losses}"
    assert weight_apart <= weight
    before = dict(base.named_parameters())
    assert run.losses[-1] < run.losses[0]
    for name, after in run.weights.items():
        if "lora_B" in name:
            assert after.abs().max() > 1e-3, f"{name} is still zero"
        elif name in before and "bias" not in name:
            assert (after - before[name]).abs().max() > 1e-4, f"{name} did not move"


@pytest.mark.parametrize("cut", range(7))
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ONE_SIDED])
def test_every_cut(trained_base: PreTrainedModel, references: dict[object, Run], mode: str, cut: int) -> None:
    plan, rate = plan_of(mode, cut)
    if (plan.cloud, cut) == (N, 0):
        pytest.skip("nothing is left to train at this cut")
    windows = random_windows(trained_base, 6, 12)
    course = Course(3, rate=rate, batch=3, seed=2)
    key = (mode, cut if plan.device is not plan.cloud else None)
    if key not in references:
        references[key] = unsplit_run(trained_base, plan, windows, course)
    check(split_steps(trained_base, plan, windows, course), references[key], WEIGHT, trained_base)


@pytest.mark.parametrize("cut", range(3))
@pytest.mark.parametrize("mode", ONE_SIDED)
def test_sides_that_train_different_things(mode: str, cut: int) -> None:
    base = random_model(tiny_llama(num_hidden_layers=3, tie_word_embeddings=True))
    plan, rate = plan_of(mode, cut)
    windows, course = random_windows(base, 6, 12), Course(3, rate=rate, batch=3, seed=2)
    check(split_steps(base, plan, windows, course), unsplit_run(base, plan, windows, course), WEIGHT, base)


def test_the_comparison_notices_what_differs() -> None:
    """Another seed, another rate, or a side that does not learn are far outside the limits."""
    base = random_model(tiny_llama(num_hidden_layers=3))
    windows, course = random_windows(base, 6, 12), Course(3, rate=3e-3, batch=3)
    plan, _ = plan_of("lora", 1)
    run = split_steps(base, plan, windows, course)
    others = [
        unsplit_run(base, plan_of("lora", 1, seed=1)[0], windows, course),
        unsplit_run(base, plan, windows, Course(3, rate=2e-3, batch=3)),
        unsplit_run(base, plan, windows, Course(3, rate=3e-3, batch=3, seed=1)),
    ]
    for other in others:
        loss, weight = run.distance(other)
        assert weight > 5 * ACCUMULATED
        assert loss > LOSS
    half = unsplit_run(base, plan_of("lora-on-the-device", 1)[0], windows, course)
    assert Run(run.losses, half.weights).distance(half)[0] > LOSS


@pytest.mark.parametrize("mode", ["lora", "full", "straight-lora", "straight-full-frozen-embeddings"])
@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gpt_neox", "opt", "gemma2"])
def test_families(family: str, mode: str) -> None:
    base = random_model(family_config(family))
    targets = tuple(FAMILIES[family][2]) or {
        "gpt2": ("c_attn",),
        "gpt_neox": ("query_key_value",),
    }.get(family, ("q_proj", "v_proj"))
    plan, rate = plan_of(mode, 1, targets=targets, optimiser=Optimiser(weight_decay=0.1))
    windows, course = random_windows(base, 6, 12), Course(3, rate=rate, batch=6)
    check(split_steps(base, plan, windows, course), unsplit_run(base, plan, windows, course), WEIGHT, base)


@pytest.mark.parametrize("mode", ["lora", "full", "straight-lora"])
def test_accumulation_changes_nothing_but_the_order_of_sums(mode: str) -> None:
    base = random_model(tiny_llama(tie_word_embeddings=True))
    plan, rate = plan_of(mode, 1)
    windows = random_windows(base, 16, 12)
    whole, parts = (Course(3, rate=rate, batch=b, accumulation=a) for b, a in ((8, 1), (2, 4)))
    reference = unsplit_run(base, plan, windows, whole)
    check(split_steps(base, plan, windows, whole), reference, WEIGHT, base)
    check(split_steps(base, plan, windows, parts), reference, ACCUMULATED, base)


@pytest.mark.parametrize("mode", ["lora", "straight-lora", "full"])
def test_the_training_loop_itself(mode: str, tmp_path: Path) -> None:
    """Warm-up, decay, epochs that end within a step, and checkpoints in between."""
    base = random_model(tiny_llama(tie_word_embeddings=True))
    plan, rate = plan_of(mode, 1)
    windows = random_windows(base, 7, 12)
    course = Course(6, rate=rate, batch=3, accumulation=2, warmup=2, decay=Decay.COSINE, save_every=2, seed=5)
    run = split_run(base, plan, windows, course, tmp_path)
    check(run, unsplit_run(base, plan, windows, course), ACCUMULATED, base)


def test_the_base_is_only_read() -> None:
    base = random_model(tiny_llama(tie_word_embeddings=True))
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in base.named_parameters()}
    windows = random_windows(base, 6, 12)
    for mode in ("lora", "full"):
        split_steps(base, plan_of(mode, 1)[0], windows, Course(2, rate=1e-2, batch=2))
    after = dict(base.named_parameters())
    assert after.keys() == before.keys()
    for name, (values, flag) in before.items():
        assert torch.equal(after[name], values), name
        assert after[name].requires_grad == flag
        assert after[name].grad is None


def test_a_tied_head_is_not_trained_in_two_places() -> None:
    base = random_model(tiny_llama(tie_word_embeddings=True))
    windows, course = random_windows(base, 6, 12), Course(1, batch=2)
    for device, cloud in ((F, F), (F, N), (N, F)):
        plan = Plan(1, Shape.STRAIGHT, device, cloud)
        with pytest.raises(ConfigurationError, match="U shape"):
            split_steps(base, plan, windows, course)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block", range(3))
def test_a_cut_in_three_is_the_whole_model(family: str, block: int) -> None:
    base = random_model(family_config(family))
    tokens = random_windows(base, 3, 10)
    three = cut_in_three(base, block)
    with torch.no_grad():
        assert torch.equal(three.forward(tokens), base(input_ids=tokens, use_cache=False).logits)

    def inside(model: object) -> set[int]:
        return {p.data_ptr() for p in find_blocks(model)[1].parameters()}  # type: ignore[arg-type]

    per_block = [{p.data_ptr() for p in module.parameters()} for module in find_blocks(base)[1]]
    assert inside(three.device.model) == set().union(*per_block[:block])
    assert inside(three.middle.model) == set().union(*per_block[block:])
    assert inside(three.tail.model) == set()


def test_cached_middles_are_the_whole_models() -> None:
    base = random_model(tiny_llama(num_hidden_layers=3))
    tokens: Tensor = random_windows(base, 2, 9)
    for block in range(4):
        three = cut_in_three(base, block)
        lower, upper = three.device.new_cache(), three.middle.new_cache()
        with torch.no_grad():
            parts = []
            for piece in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:]):
                crossing = three.device(piece, None, lower)
                hidden = three.middle(crossing, upper)
                parts.append(three.tail(Crossing(hidden, crossing.mask[:, -piece.shape[1] :])))
            assert torch.allclose(torch.cat(parts, 1), base(tokens).logits, atol=1e-5)
