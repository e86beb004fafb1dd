"""Device half + cloud half = the whole model, exactly, for every family at every cut."""

import inspect
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from equivalence.support import NO_SHARED, SHARED, endless, greedy, random_model, tiny_llama
from equivalence.test_families import FAMILIES, family_config
from splitveil.errors import BaseModelError, ConfigurationError
from splitveil.split import Crossing, cut
from splitveil.split.blocks import find_blocks

BATCH, LENGTH, NEW = 3, 10, 12
# Shorter than a prompt, so that cached decoding leaves it behind.
SLIDING = {"mistral": 8, "gemma2": 8, "gemma3_text": 8, "qwen2": 8}


def with_three_blocks(name: str) -> PreTrainedModel:
    config = family_config(name)
    config.update({"n_layer" if name == "gpt2" else "num_hidden_layers": 3})
    if name in SLIDING:
        config.sliding_window = SLIDING[name]
    if getattr(config, "layer_types", None) is not None:
        kinds = ("sliding_attention" if name in SLIDING else "full_attention", "full_attention")
        config.layer_types = [kinds[i % 2] for i in range(3)]
    return random_model(config)


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request: pytest.FixtureRequest) -> Iterator[PreTrainedModel]:
    return with_three_blocks(request.param)


@pytest.fixture(scope="module")
def prompts(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Prompts of three lengths, padded on the left, and their mask."""
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, model.config.vocab_size, (BATCH, LENGTH), generator=draw)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    mask[1, :1] = 0
    return tokens, mask


def whole_logits(model: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """The whole model's logits, with positions counted from the mask as ``generate`` counts them."""
    more = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        more["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=mask, use_cache=False, **more).logits


def cached_logits(model: nn.Module, text: Tensor, mask: Tensor, prompt: int) -> Tensor:
    """(steps, batch, vocabulary) logits of the tokens after ``prompt``, read with a cache, one token at a time."""
    positions = "position_ids" in inspect.signature(model.forward).parameters
    mask = torch.cat([mask, mask.new_ones(len(text), text.shape[1] - prompt)], 1)
    counted = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, steps, begin = None, [], 0
    with torch.no_grad():
        for end in range(prompt, text.shape[1]):
            more = {"position_ids": counted[:, begin:end]} if positions else {}
            out = model(
                input_ids=text[:, begin:end],
                attention_mask=mask[:, :end],
                past_key_values=cache,
                use_cache=True,
                **more,
            )
            cache, begin = out.past_key_values, end
            steps.append(out.logits[:, -1].float())
    return torch.stack(steps)


@pytest.mark.parametrize("block", range(4))
def test_logits_and_greedy_tokens_are_the_whole_models(
    model: PreTrainedModel, prompts: tuple[Tensor, Tensor], block: int
) -> None:
    tokens, mask = prompts
    halves = cut(model, block)
    with torch.no_grad():
        got = halves.forward(tokens, mask)
    assert torch.equal(got[mask.bool()], whole_logits(model, tokens, mask)[mask.bool()])
    # Cached decoding: not the tokens alone, the logits of every step.
    steps: list[Tensor] = []
    watch = halves.cloud.register_forward_hook(lambda _, __, logits: steps.append(logits[:, -1].float()))
    text = halves.generate(tokens, mask, max_new_tokens=NEW)
    watch.remove()
    assert torch.equal(text, greedy(model, tokens, NEW, attention_mask=mask))
    assert torch.equal(torch.stack(steps), cached_logits(model, text, mask, tokens.shape[1]))


@pytest.mark.parametrize("block", range(4))
def test_right_padding_changes_nothing(model: PreTrainedModel, prompts: tuple[Tensor, Tensor], block: int) -> None:
    tokens, mask = prompts[0], prompts[1].flip(1)
    with torch.no_grad():
        got = cut(model, block).forward(tokens, mask)
    assert torch.equal(got[mask.bool()], whole_logits(model, tokens, mask)[mask.bool()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_exact_too(dtype: torch.dtype) -> None:
    model = random_model(tiny_llama(), dtype=dtype)
    tokens = torch.randint(2, 160, (2, 9), generator=torch.Generator().manual_seed(2))
    for block in range(3):
        crossing = cut(model, block).device(tokens)
        assert crossing.hidden.dtype == dtype
        with torch.no_grad():
            assert torch.equal(cut(model, block).forward(tokens), model(tokens).logits)


def test_a_half_that_is_wrong_is_noticed(model: PreTrainedModel, prompts: tuple[Tensor, Tensor]) -> None:
    """The comparison can fail: another block's crossing gives other logits."""
    tokens, mask = prompts
    with torch.no_grad():
        wrong = cut(model, 2).cloud(cut(model, 1).device(tokens, mask))
    assert not torch.allclose(wrong[mask.bool()], whole_logits(model, tokens, mask)[mask.bool()], atol=1e-3)


def test_each_half_has_its_own_blocks_only() -> None:
    model = random_model(tiny_llama(num_hidden_layers=4))
    halves = cut(model, 1)

    def weights(half: nn.Module) -> set[int]:
        return {p.data_ptr() for p in find_blocks(half.model)[1].parameters()}  # type: ignore[arg-type]

    per_block = [{p.data_ptr() for p in block.parameters()} for block in model.model.layers]
    assert weights(halves.device) == per_block[0]
    assert weights(halves.cloud) == per_block[1] | per_block[2] | per_block[3]


def test_the_model_is_left_as_it_was(model: PreTrainedModel, prompts: tuple[Tensor, Tensor]) -> None:
    before = whole_logits(model, *prompts)
    names = list(model.state_dict())
    cut(model, 1).forward(*prompts)
    assert list(model.state_dict()) == names
    assert torch.equal(whole_logits(model, *prompts), before)


def test_an_adapter_is_cut_with_its_model() -> None:
    model = random_model(tiny_llama())
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    tokens = torch.randint(2, 160, (2, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = peft(tokens).logits
        assert torch.equal(cut(peft, 1).forward(tokens), whole)
        with peft.disable_adapter():
            assert not torch.equal(peft(tokens).logits, whole)


def test_several_sessions_share_a_half() -> None:
    model = random_model(tiny_llama())
    halves = cut(model, 1)
    prompts = torch.randint(2, 160, (8, 1, 9), generator=torch.Generator().manual_seed(3))
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda tokens: halves.generate(tokens, max_new_tokens=8), prompts))
    for tokens, text in zip(prompts, got, strict=True):
        assert torch.equal(text, greedy(model, tokens, 8))


@pytest.mark.parametrize("name", ["stories260K", "stories3M"])
def test_trained_models_at_every_cut(name: str) -> None:
    folder = SHARED / "models" / name
    if not folder.is_dir():
        pytest.skip(NO_SHARED)
    model = endless(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    draw = torch.Generator().manual_seed(4)
    tokens = torch.randint(2, model.config.vocab_size, (2, 8), generator=draw)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    expected = greedy(model, tokens, 24, attention_mask=mask)
    for block in range(model.config.num_hidden_layers + 1):
        assert torch.equal(cut(model, block).generate(tokens, mask, max_new_tokens=24), expected), f"cut {block}"


def test_bad_cuts_and_crossings_are_refused() -> None:
    model = random_model(tiny_llama())
    for block in (-1, 3):
        with pytest.raises(ConfigurationError, match=r"cuts 0 to 2"):
            cut(model, block)
    halves = cut(model, 1)
    with pytest.raises(ConfigurationError, match="mask covers"):
        halves.device(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 3))
    with pytest.raises(ConfigurationError, match="do not fit"):
        Crossing(torch.zeros(2, 4, 8), torch.ones(1, 4))
    with pytest.raises(ConfigurationError, match="hidden"):
        Crossing(torch.zeros(2, 4), torch.ones(2, 4))
    model.model.layers = nn.ModuleList([*model.model.layers, *model.model.layers])
    with pytest.raises(BaseModelError, match="one list of 2 blocks"):
        cut(model, 1)
