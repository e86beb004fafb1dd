"""Private = PEFT on a randomly initialised model of every family, for every linear module that PEFT adapts."""

from collections.abc import Callable, Iterator

import pytest
import transformers
from peft import LoraConfig
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from equivalence.support import (
    RANDOM_LIMIT,
    Served,
    draw_case,
    greedy,
    logits,
    random_model,
    random_prompts,
    report,
    same_greedy,
    served_by_both,
)
from splitveil.adapters import load_adapter

Record = Callable[[str, object], None]

_SHAPE = {"vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA_LIKE = {"intermediate_size": 96, "num_key_value_heads": 2, "initializer_range": 0.125, "pad_token_id": None}
_UNTIED = {"tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None}
_GPT2 = {"vocab_size": 160, "n_embd": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.125}

# Class, what it is given beyond the shape, and targets where PEFT has no default for the family. The first Llama has
# inputs of three ring elements; OPT has its projections around the blocks; Phi-3, GLM and GPT-NeoX have fused modules.
FAMILIES: dict[str, tuple[str, dict[str, object], list[str]]] = {
    "llama": ("LlamaConfig", _LLAMA_LIKE | {"intermediate_size": 4100}, []),
    "qwen2": ("Qwen2Config", _LLAMA_LIKE, []),
    "qwen3": ("Qwen3Config", _LLAMA_LIKE | {"head_dim": 16}, []),
    "mistral": ("MistralConfig", _LLAMA_LIKE, []),
    "gpt2": ("GPT2Config", _GPT2, []),
    "opt": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 32, "init_std": 0.125}, []),
    "gpt_neox": ("GPTNeoXConfig", {"intermediate_size": 96, "initializer_range": 0.125}, []),
    "phi": ("PhiConfig", _LLAMA_LIKE, []),
    "phi3": ("Phi3Config", _LLAMA_LIKE, ["qkv_proj"]),
    "gemma": ("GemmaConfig", _LLAMA_LIKE | {"head_dim": 16}, []),
    "gemma2": ("Gemma2Config", _LLAMA_LIKE | {"head_dim": 16}, []),
    "gemma3_text": ("Gemma3TextConfig", _LLAMA_LIKE | {"head_dim": 16}, []),
    "glm": ("GlmConfig", _LLAMA_LIKE | {"head_dim": 16}, ["q_proj", "v_proj"]),
    "glm4": ("Glm4Config", _LLAMA_LIKE | {"head_dim": 16}, ["q_proj", "v_proj"]),
}
VARIANTS = ("default-targets", "all-linear", "listed-rslora")


def family_config(name: str) -> PretrainedConfig:
    kind, fields, _ = FAMILIES[name]
    shape = {} if name == "gpt2" else _SHAPE
    return getattr(transformers, kind)(**(shape | _UNTIED | fields))


def linear_modules(model: PreTrainedModel) -> list[str]:
    """Names of all linear modules but the head."""
    head = model.get_output_embeddings()
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]


def lora_of(variant: str, name: str, base: PreTrainedModel) -> LoraConfig:
    common = {"task_type": "CAUSAL_LM", "fan_in_fan_out": name == "gpt2"}
    if variant == "default-targets":
        return LoraConfig(r=4, lora_alpha=8, target_modules=FAMILIES[name][2] or PEFT_TARGETS[name], **common)
    if variant == "all-linear":
        return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **common)
    kinds = sorted({module.rpartition(".")[2] for module in linear_modules(base)})
    return LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=kinds,
        use_rslora=True,
        rank_pattern={kinds[0]: 7},
        alpha_pattern={kinds[-1]: 5},
        **common,
    )


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One family's model, and an adapter for each variant."""
    name: str = request.param
    base = random_model(family_config(name))
    prompts = random_prompts(base, 8, 8)
    cases = {v: draw_case(base, tmp_path_factory.mktemp(v), lora_of(v, name, base), prompts, 24) for v in VARIANTS}
    with served_by_both(cases) as served:
        yield served


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_pefts(family: Served, variant: str, engine: str, record_property: Record) -> None:
    case = family.cases[variant]
    assert case.changed >= 0.5
    with family.connected(engine, adapter=variant) as model:
        # The first pass sends one query a module and learns which of them share one; the second pass shares.
        for name in ("first pass", "later passes"):
            verdict = case.judge(logits(model, case.sequences))
            report(record_property, name, verdict)
            verdict.check(RANDOM_LIMIT)


def test_greedy_tokens_are_pefts(family: Served, engine: str, record_property: Record) -> None:
    case = family.cases["all-linear"]
    with family.connected(engine, adapter="all-linear") as model:
        got = greedy(model, case.prompts, case.new_tokens)
    report(record_property, "identical prompts", same_greedy(case, got))


@pytest.mark.parametrize("variant", ["all-linear", "listed-rslora"])
def test_every_linear_module_is_served(family: Served, variant: str) -> None:
    case = family.cases[variant]
    served = [module.name for module in load_adapter(case.folder).modules]
    assert sorted(served) == sorted(linear_modules(case.base))
