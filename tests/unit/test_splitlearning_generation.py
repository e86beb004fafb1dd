"""Text through a split model = text of the whole model."""

from collections.abc import Callable

import pytest
import torch
from equivalence.support import greedy, random_model, random_prompts, tiny_llama
from equivalence.test_families import family_config
from torch import Tensor
from transformers import PreTrainedModel

from splitveil.errors import ConfigurationError
from splitveil.splitlearning.cloud import LocalCloud
from splitveil.splitlearning.device import Device
from splitveil.splitlearning.generation import Sampling, generate
from splitveil.splitlearning.interface import Shape

Make = Callable[[int, Shape], tuple[Device, LocalCloud]]
NEW = 10


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return random_model(tiny_llama(max_position_embeddings=32, tie_word_embeddings=True))


def sides(base: PreTrainedModel, cut: int, shape: Shape) -> tuple[Device, LocalCloud]:
    return Device(base, cut=cut, shape=shape), LocalCloud(base, cut=cut, shape=shape)


def padded(base: PreTrainedModel) -> tuple[Tensor, Tensor]:
    tokens = random_prompts(base, 3, 8)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    mask[2, :1] = 0
    return tokens, mask


@pytest.mark.parametrize("shape", Shape)
@pytest.mark.parametrize("cut", range(3))
def test_greedy_is_the_whole_models(base: PreTrainedModel, cut: int, shape: Shape) -> None:
    tokens, mask = padded(base)
    expected = greedy(base, tokens, NEW, attention_mask=mask)
    seen: list[Tensor] = []
    device, cloud = sides(base, cut, shape)
    for _ in range(2):  # the second time with a cache that has to be emptied
        got = generate(device, cloud, tokens, mask, max_new_tokens=NEW, each=seen.append)
        assert torch.equal(got, expected)
    assert torch.equal(torch.stack(seen[:NEW], 1), expected[:, 8:])


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "gemma2"])
def test_families(family: str) -> None:
    base = random_model(family_config(family))
    tokens, mask = padded(base)
    expected = greedy(base, tokens, NEW, attention_mask=mask)
    for shape in Shape:
        device, cloud = sides(base, 1, shape)
        assert torch.equal(generate(device, cloud, tokens, mask, max_new_tokens=NEW), expected)


@pytest.mark.parametrize("shape", Shape)
def test_end_tokens(base: PreTrainedModel, shape: Shape) -> None:
    tokens, mask = padded(base)
    free = greedy(base, tokens, NEW, attention_mask=mask)
    ends = {int(free[0, 10]), int(free[1, 12])}
    expected = greedy(base, tokens, NEW, attention_mask=mask, eos_token_id=sorted(ends), pad_token_id=1)
    assert not torch.equal(expected, free[:, : expected.shape[1]])
    device, cloud = sides(base, 1, shape)
    got = generate(device, cloud, tokens, mask, max_new_tokens=NEW, end=ends, pad=1)
    assert torch.equal(got, expected)
    alone = generate(device, cloud, tokens[1:2], max_new_tokens=NEW, end=ends)
    assert alone.shape[1] <= 13
    assert int(alone[0, -1]) in ends


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(top_k=3),
        Sampling(temperature=1.5, top_p=0.6),
        Sampling(temperature=1.2, top_k=8, top_p=0.8),
    ],
)
def test_sampling_draws_as_the_whole_model_does(base: PreTrainedModel, sampling: Sampling) -> None:
    """One step for many copies of one prompt: how often each token comes, beside ``generate``'s own processors."""
    prompt = random_prompts(base, 1, 6)
    copies, count = prompt.repeat(64, 1), 12
    device, cloud = sides(base, 1, Shape.U)
    drawn = torch.cat(
        [
            generate(
                device,
                cloud,
                copies,
                max_new_tokens=1,
                sampling=Sampling(sampling.temperature, sampling.top_k, sampling.top_p, seed=seed),
            )[:, -1]
            for seed in range(count)
        ]
    )
    more = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    whole = base.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=1,
        do_sample=True,
        return_dict_in_generate=True,
        output_scores=True,
        **more,
    )
    probabilities = whole.scores[0][0].softmax(-1)
    shares = torch.bincount(drawn, minlength=len(probabilities)) / len(drawn)
    assert not bool(shares[probabilities == 0].any())
    # Five standard deviations of a share, and no less than a few draws.
    allowed = 5 * (probabilities * (1 - probabilities) / len(drawn)).sqrt() + 3 / len(drawn)
    assert bool(((shares - probabilities).abs() <= allowed).all())
    assert len(drawn.unique()) > 1


def test_a_seed_repeats_and_no_seed_does_not(base: PreTrainedModel) -> None:
    tokens = random_prompts(base, 2, 6)
    device, cloud = sides(base, 1, Shape.STRAIGHT)
    texts = [
        generate(device, cloud, tokens, max_new_tokens=NEW, sampling=Sampling(temperature=2.0, seed=seed))
        for seed in (1, 1, 2, None, None)
    ]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
    assert not torch.equal(texts[3], texts[4])


def test_what_is_refused(base: PreTrainedModel) -> None:
    device, cloud = sides(base, 1, Shape.U)
    tokens = random_prompts(base, 2, 6)
    right = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    hole = torch.tensor([[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    for wrong, more, message in (
        (tokens, {"mask": right}, "padded on the left"),
        (tokens, {"mask": hole}, "padded on the left"),
        (tokens, {"mask": tokens}, "0 and 1"),
        (tokens, {"max_new_tokens": 0}, "at least one"),
        (tokens, {"max_new_tokens": 28}, "context of 32"),
        (tokens + 159, {}, "vocabulary"),
        (tokens[:, :0], {}, "int64 ids"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            generate(device, cloud, wrong, **({"max_new_tokens": NEW} | more))  # type: ignore[arg-type]
    assert generate(device, cloud, tokens, max_new_tokens=27).shape == (2, 33)
    for numbers in ({"temperature": 0.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"temperature": float("nan")}):
        with pytest.raises(ConfigurationError):
            Sampling(**numbers)  # type: ignore[arg-type]
