"""Real adapters that others trained: by names and shapes on the full base model, in numbers on a cut of its shape."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, PretrainedConfig, PreTrainedModel, Qwen2Config

from equivalence.support import (
    NO_SHARED,
    RANDOM_LIMIT,
    SHARED,
    different,
    endless,
    greedy,
    judge,
    logits,
    private,
    published,
    random_prompts,
    report,
    server,
    stated_error,
    tolerance,
)
from splitveil.adapters import load_adapter
from splitveil.errors import BaseModelError
from splitveil.private.core import core_rms
from splitveil.private.layer import public_half
from splitveil.serving.connect import locate

Record = Callable[[str, object], None]

LAW, SUPPORT = SHARED / "lora" / "law-llm", SHARED / "lora" / "support-chatbot"
needs_shared = pytest.mark.skipif(not (LAW.is_dir() and SUPPORT.is_dir()), reason=NO_SHARED)

QWEN_3B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
}


def skewed(rank: int) -> float:
    """How much larger than stated the relative error of a core of that rank may be.

    Stated is the error of a core whose rows are equally long. The query is scaled to the longest row, and a real
    adapter often has one dominant direction. At worst one row holds all of it and is √rank × the r.m.s. row: the
    masks' half of the error grows by that, the half that the core's rounding makes stays.
    """
    return math.sqrt((1 + rank) / 2)


def on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """A model with names and shapes and no numbers."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def adapted_by_peft(base: PreTrainedModel, folder: Path) -> set[str]:
    """The modules that PEFT itself adapts."""
    peft = get_peft_model(base, LoraConfig.from_pretrained(folder))
    prefix = "base_model.model."
    return {name.removeprefix(prefix) for name, m in peft.named_modules() if isinstance(m, LoraLayer)}


@needs_shared
@pytest.mark.parametrize(
    ("folder", "config", "count", "rank"),
    [(LAW, Qwen2Config(**QWEN_3B), 72, 4), (SUPPORT, GPT2Config(), 12, 8)],
    ids=["law-llm", "support-chatbot"],
)
def test_names_and_shapes_fit_the_full_base_model(
    folder: Path, config: PretrainedConfig, count: int, rank: int, engine: str
) -> None:
    publication = published(folder, engine).publication
    found = locate(on_meta(config), publication)
    assert len(found) == count
    assert {layer.rank for layer in publication.layers} == {rank}
    assert {m.name for m in found} == adapted_by_peft(on_meta(config), folder)
    for m in found:
        weight = m.module.weight
        assert sorted(weight.shape) == sorted((publication.layers[m.layer].width, m.features))


@needs_shared
def test_the_adapter_of_one_base_does_not_fit_another() -> None:
    publication = published(LAW, "plain").publication
    for changes in ({"hidden_size": 1536, "num_attention_heads": 12}, {"num_key_value_heads": 4}):
        with pytest.raises(BaseModelError, match="it is for another base model"):
            locate(on_meta(Qwen2Config(**(QWEN_3B | changes))), publication)
    with pytest.raises(BaseModelError, match="has no module"):
        locate(on_meta(GPT2Config()), publication)


def cut_adapter(folder: Path, to: Path, prefixes: tuple[str, ...], alpha: float) -> None:
    """Copies the tensors of some modules, with another alpha."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": alpha}))
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}
    safetensors.torch.save_file(kept, to / "adapter_model.safetensors")


@contextmanager
def plaintext(base: PreTrainedModel, folder: Path) -> Iterator[PeftModel]:
    """PEFT around ``base`` itself, which is too large to be copied; taken off again at the end."""
    peft = PeftModel.from_pretrained(base, folder).eval()
    try:
        yield peft
    finally:
        peft.unload()


def random_base(config: PretrainedConfig) -> PreTrainedModel:
    """Normal weights; quicker than the model's own initialisation of a hundred million parameters."""
    model = on_meta(config).to_empty(device="cpu")
    model.init_weights()
    return endless(model.eval())


def strong_enough(
    base: PreTrainedModel, folder: Path, to: Path, prefixes: tuple[str, ...], prompts: Tensor
) -> tuple[float, Tensor]:
    """The smallest alpha tried with which the adapter changes half of plaintext's tokens, and those sequences.

    The adapter was trained for other base weights than these random ones: at its own alpha it changes few tokens.
    """
    own = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    free = greedy(base, prompts, 8)
    for factor in (1, 4, 16, 32, 64, 128, 256):
        cut_adapter(folder, to, prefixes, own * factor)
        without = logits(base, prompts).argmax(-1)
        with plaintext(base, to) as peft:
            if (logits(peft, prompts).argmax(-1) == without).float().mean() > 0.6:
                continue
            sequences = greedy(peft, prompts, 8)
        if different(free, sequences, prompts.shape[1]) >= 0.5:
            return own * factor, sequences
    pytest.fail("the adapter changes hardly any token of this random base model, at any scale")


CUTS = {
    "law-llm": (
        LAW,
        Qwen2Config(**(QWEN_3B | {"num_hidden_layers": 2, "vocab_size": 512, "tie_word_embeddings": False})),
        ("base_model.model.model.layers.0.", "base_model.model.model.layers.1."),
    ),
    "support-chatbot": (
        SUPPORT,
        GPT2Config(vocab_size=512, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None),
        ("base_model.model.",),
    ),
}


@needs_shared
@pytest.mark.parametrize("name", CUTS)
def test_logits_are_pefts(name: str, tmp_path: Path, record_property: Record) -> None:
    folder, config, prefixes = CUTS[name]
    rank = load_adapter(folder).modules[0].A.shape[0]
    torch.manual_seed(0)
    base = random_base(config)
    prompts = random_prompts(base, 6, 6)
    alpha, sequences = strong_enough(base, folder, tmp_path, prefixes, prompts)
    report(record_property, "alpha", f"{alpha:g}; the adapter's own is {load_alpha(folder):g}")
    with plaintext(base, tmp_path) as peft:
        want, stated = logits(peft, sequences), tolerance(peft, sequences, draws=3)
        allowed = tolerance(peft, sequences, draws=3, factor=skewed(rank))
    for engine in ("lattice", "plain"):
        with server({"a": tmp_path}, engine) as running, private(base, running.address) as model:
            for _ in range(2):
                verdict = judge(logits(model, sequences), want, allowed)
                report(record_property, engine, f"{verdict}; {verdict.deviation / stated:.0%} of that for even cores")
                verdict.check(RANDOM_LIMIT)


@needs_shared
@pytest.mark.parametrize("folder", [LAW, SUPPORT], ids=["law-llm", "support-chatbot"])
def test_relative_error_of_real_cores(folder: Path, record_property: Record) -> None:
    """Each module of the untouched folder on its own, at its own alpha, against B·A·x in float64."""
    draw = np.random.default_rng(0)
    served = published(folder, "lattice")
    half, ratios, peaks = public_half(served.publication), [], []
    modules = {module.name: module for module in load_adapter(folder).modules}
    for index, layer in enumerate(served.publication.layers):
        module = modules[layer.outputs[0][0]]
        x = draw.standard_normal((256, layer.width)).astype(np.float32)
        site = half.site([index])
        query, pending = site.query(x, site.make_masks(len(x)))
        (core,) = site.recover(pending, served.half.answer([index], len(x), query))
        want = module.scale * (x.astype(np.float64) @ module.A.T) @ module.B.T
        error = np.linalg.norm(core @ layer.Q.T - want) / np.linalg.norm(want)
        ratios.append(error / stated_error(layer.width))
        peaks.append(layer.norm_bound / (core_rms(layer.width) * math.sqrt(layer.width)))
    report(record_property, "relative error ÷ the stated one", f"mean {np.mean(ratios):.2f}, most {max(ratios):.2f}")
    report(record_property, "longest row of a core ÷ r.m.s.", f"mean {np.mean(peaks):.2f}, most {max(peaks):.2f}")
    assert max(ratios) < 1.4 * skewed(layer.rank)


def load_alpha(folder: Path) -> float:
    """Alpha of a folder, as rank × scale of its first module."""
    module = load_adapter(folder).modules[0]
    return module.scale * module.A.shape[0]
