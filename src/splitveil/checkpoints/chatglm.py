"""ChatGLM2 and its successors, which come with remote code, as transformers' ``GlmForCausalLM``, which needs none.

The architecture is the same: grouped attention with a bias on query, key and value, rotary positions on half of each
head in interleaved pairs, a gated MLP, RMSNorm. The names differ, and one module does: ``query_key_value`` is one
matrix there and three modules here. An adapter on it becomes three that share A, which are served as one private layer.

Fields and names are those of ``THUDM/chatglm2-6b`` (``config.json``, ``modeling_chatglm.py``). The tokenizer is remote
code as well and is not converted.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from splitveil.adapters import load_adapter
from splitveil.errors import AdapterError, BaseModelError, ConfigurationError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
ROPE_BASE = 10_000.0

# What the architecture must be, field by field: the value needed, then others that mean the same. An absent field has
# the value needed, except for those whose default in the original code is another.
_NEEDED_IN_WORDS = ("add_qkv_bias", "multi_query_attention")
_EXPECTED: Mapping[str, tuple[Any, ...]] = {
    "add_bias_linear": (False,),
    "add_qkv_bias": (True,),
    "apply_residual_connection_post_layernorm": (False,),
    "fp32_residual_connection": (False,),
    "multi_query_attention": (True,),
    "post_layer_norm": (True,),
    "interleaved_qkv": (False,),
    "rmsnorm": (True,),
    "original_rope": (True,),
    "quantization_bit": (0, None),
    "pre_seq_len": (None,),
    "prefix_projection": (False,),
    "tie_word_embeddings": (False,),
}
_NUMBERS = (
    "hidden_size",
    "ffn_hidden_size",
    "kv_channels",
    "multi_query_group_num",
    "num_attention_heads",
    "num_layers",
    "padded_vocab_size",
    "seq_length",
)

_OUTSIDE = {
    "transformer.embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "transformer.encoder.final_layernorm.weight": "model.norm.weight",
    "transformer.output_layer.weight": "lm_head.weight",
}
# Computed from the configuration, and stored all the same.
_DERIVED = re.compile(r"transformer\.rotary_pos_emb\.inv_freq")
_BLOCK = re.compile(r"transformer\.encoder\.layers\.(?P<block>[0-9]+)\.(?P<rest>.+)")
_INSIDE = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.dense.weight": "self_attn.o_proj.weight",
    "mlp.dense_h_to_4h.weight": "mlp.gate_up_proj.weight",
    "mlp.dense_4h_to_h.weight": "mlp.down_proj.weight",
}
_FUSED = "self_attention.query_key_value."
_PARTS = ("q_proj", "k_proj", "v_proj")
_MODULES = {source.removesuffix(".weight"): target.removesuffix(".weight") for source, target in _INSIDE.items()}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Shape:
    """What the names and the fused projection are translated by."""

    blocks: int
    heads: int
    groups: int
    """Key and value heads."""
    head: int
    """Features of one head."""

    @property
    def parts(self) -> tuple[int, int, int]:
        """Rows of query, key and value in the fused projection."""
        return self.heads * self.head, self.groups * self.head, self.groups * self.head


def convert_model(source: Path, target: Path, progress: Progress | None = None) -> None:
    """Writes the checkpoint in ``source`` (original names) to the new folder ``target`` (``GlmForCausalLM``).

    Weights are copied as they are, in their dtype, one file of ``source`` at a time. ``progress(done, files)``.

    Raises ``BaseModelError`` for what is no such checkpoint, or another architecture, or incomplete;
    ``ConfigurationError`` if ``target`` exists and is not empty.
    """
    config, shape = read_config(source)
    files = _files(source)
    _new(target)
    index: dict[str, str] = {}
    size = 0
    for done, file in enumerate(files):
        named: dict[str, Tensor] = {}
        for name, tensor in _tensors(file):
            for new, part in _renamed(name, tensor, shape, file.name):
                if new in index or new in named:
                    raise BaseModelError(f"{file.name}: {name} occurs twice in {source}; copy the checkpoint again")
                named[new] = part.contiguous()
        out = f"model-{done + 1:05}-of-{len(files):05}.safetensors"
        save_file(named, target / out, metadata={"format": "pt"})
        index.update(dict.fromkeys(named, out))
        size += sum(tensor.numel() * tensor.element_size() for tensor in named.values())
        config["dtype"] = str(next(iter(named.values())).dtype).removeprefix("torch.") if named else config["dtype"]
        if progress is not None:
            progress(done + 1, len(files))
    missing = _expected_names(shape) - index.keys()
    if missing:
        raise BaseModelError(
            f"{source} lacks {len(missing)} tensors ({', '.join(sorted(missing)[:3])}); download all of its files"
        )
    (target / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=1))
    # Last: a folder with a configuration is a complete one.
    (target / CONFIG).write_text(json.dumps(config, indent=1))


def convert_adapter(source: Path, target: Path, base: Path) -> None:
    """Writes a PEFT adapter that was trained on the original names for the converted model.

    ``base`` is the folder of the original checkpoint or of the converted one: its configuration says how the rows of
    ``query_key_value`` are divided. Raises ``AdapterError`` for an adapter of other modules, and as ``load_adapter``.
    """
    shape = read_config(base)[1] if _is_chatglm(base) else _converted_shape(base)
    adapter = load_adapter(source)
    _new(target)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module in adapter.modules:
        a, b = torch.tensor(module.A), torch.tensor(module.B)
        for name, part in _adapted(module.name, b, shape):
            tensors[f"base_model.model.{name}.lora_A.weight"] = a.clone()
            tensors[f"base_model.model.{name}.lora_B.weight"] = part.contiguous()
            ranks[name] = module.rank
            alphas[name] = module.scale * module.rank
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": None,
        "r": next(iter(ranks.values())),
        "lora_alpha": next(iter(alphas.values())),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted({name.rpartition(".")[2] for name in ranks}),
        "rank_pattern": ranks if len(set(ranks.values())) > 1 else {},
        "alpha_pattern": alphas if len(set(alphas.values())) > 1 else {},
    }
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    (target / "adapter_config.json").write_text(json.dumps(settings, indent=1))


def read_config(folder: Path) -> tuple[dict[str, Any], Shape]:
    """The configuration for ``GlmForCausalLM``, and the shape. Raises ``BaseModelError``."""
    given = _json(folder / CONFIG)
    if given.get("model_type") != "chatglm":
        raise BaseModelError(f"{folder} holds a {given.get('model_type')!r} model; a ChatGLM checkpoint was expected")
    for name, values in _EXPECTED.items():
        value = given.get(name, None if name in _NEEDED_IN_WORDS else values[0])
        if value not in values:
            raise BaseModelError(f"{folder}: {name} is {value!r}, expected {values[0]!r}; it is another architecture")
    if _real(given, "rope_ratio", 1.0, folder) != 1:
        raise BaseModelError(
            f"{folder}: rope_ratio is {given['rope_ratio']!r}; versions of ChatGLM mean different things by it "
            "(positions divided, or a larger base), so only 1 is converted"
        )
    numbers = {name: given.get(name) for name in _NUMBERS}
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BaseModelError(f"{folder}: {name} is {value!r}; a positive whole number was expected")
    n: dict[str, int] = {name: int(value) for name, value in numbers.items() if value is not None}
    if n["num_attention_heads"] % n["multi_query_group_num"]:
        raise BaseModelError(
            f"{folder}: {n['num_attention_heads']} heads cannot share {n['multi_query_group_num']} groups"
        )
    shape = Shape(n["num_layers"], n["num_attention_heads"], n["multi_query_group_num"], n["kv_channels"])
    return {
        "architectures": ["GlmForCausalLM"],
        "model_type": "glm",
        "vocab_size": n["padded_vocab_size"],
        "hidden_size": n["hidden_size"],
        "intermediate_size": n["ffn_hidden_size"],
        "num_hidden_layers": shape.blocks,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups,
        "head_dim": shape.head,
        "hidden_act": "silu",
        "max_position_embeddings": n["seq_length"],
        "rms_norm_eps": _real(given, "layernorm_epsilon", 1e-5, folder),
        "attention_bias": True,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": ROPE_BASE,
            "partial_rotary_factor": 0.5,
        },
        "bos_token_id": given.get("bos_token_id", 1),
        "eos_token_id": given.get("eos_token_id", 2),
        "pad_token_id": given.get("pad_token_id", 0),
        "dtype": str(given.get("torch_dtype", "float16")),
    }, shape


def _real(given: dict[str, Any], name: str, absent: float, folder: Path) -> float:
    value = given.get(name, absent)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise BaseModelError(f"{folder}: {name} is {value!r}; a positive number was expected")
    return float(value)


def _is_chatglm(folder: Path) -> bool:
    return _json(folder / CONFIG).get("model_type") == "chatglm"


def _converted_shape(folder: Path) -> Shape:
    given = _json(folder / CONFIG)
    names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    values = [given.get(name) for name in names]
    if given.get("model_type") != "glm" or not all(isinstance(value, int) for value in values):
        raise BaseModelError(f"{folder} is neither a ChatGLM checkpoint nor a converted one")
    return Shape(*(int(value) for value in values if value is not None))


def _renamed(name: str, tensor: Tensor, shape: Shape, where: str) -> Iterator[tuple[str, Tensor]]:
    """New names and tensors of one old tensor: three for the fused projection, none for what is computed anyway."""
    if _DERIVED.fullmatch(name):
        return
    if name in _OUTSIDE:
        yield _OUTSIDE[name], tensor
        return
    found = _BLOCK.fullmatch(name)
    if found is None or int(found["block"]) >= shape.blocks:
        raise BaseModelError(f"{where}: {name} is no tensor of a ChatGLM model of {shape.blocks} blocks")
    block, rest = f"model.layers.{found['block']}.", found["rest"]
    if rest in _INSIDE:
        yield block + _INSIDE[rest], tensor
    elif rest in (f"{_FUSED}weight", f"{_FUSED}bias"):
        if tensor.shape[0] != sum(shape.parts):
            raise BaseModelError(f"{where}: {name} has {tensor.shape[0]} rows, expected {sum(shape.parts)}")
        for part, rows in zip(_PARTS, torch.split(tensor, list(shape.parts)), strict=True):
            yield f"{block}self_attn.{part}.{rest.removeprefix(_FUSED)}", rows
    else:
        raise BaseModelError(f"{where}: {name} is no tensor of a ChatGLM model")


def _adapted(name: str, b: Tensor, shape: Shape) -> Iterator[tuple[str, Tensor]]:
    """New names of an adapted module, with their rows of B."""
    found = _BLOCK.fullmatch(name)
    if found is None or int(found["block"]) >= shape.blocks:
        raise AdapterError(f"the adapter adapts {name}, which is no block of a ChatGLM model of {shape.blocks} blocks")
    block, rest = f"model.layers.{found['block']}.", found["rest"]
    if rest in _MODULES and not rest.endswith("layernorm"):
        yield block + _MODULES[rest], b
    elif rest == _FUSED.removesuffix("."):
        if b.shape[0] != sum(shape.parts):
            raise AdapterError(f"the adapter of {name} has {b.shape[0]} outputs, the base model {sum(shape.parts)}")
        for part, rows in zip(_PARTS, torch.split(b, list(shape.parts)), strict=True):
            yield f"{block}self_attn.{part}", rows
    else:
        raise AdapterError(f"the adapter adapts {name}, which is no linear module of a ChatGLM model")


def _expected_names(shape: Shape) -> set[str]:
    names = set(_OUTSIDE.values())
    for block in range(shape.blocks):
        names |= {f"model.layers.{block}.{name}" for name in _INSIDE.values()}
        names |= {f"model.layers.{block}.self_attn.{part}.{kind}" for part in _PARTS for kind in ("weight", "bias")}
    return names


def _files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    if any(folder.glob("*.bin")):
        raise BaseModelError(
            f"{folder} holds PyTorch .bin files, which are pickles and can run what they contain; they are not read. "
            "Download the .safetensors files of the model, or convert it to them where it came from"
        )
    raise BaseModelError(f"{folder} holds no weights (*.safetensors); download all of its files")


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of one file."""
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                yield name, opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BaseModelError(f"{file} cannot be read as weights: {first}") from None


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{file} cannot be read as a model's configuration: {type(error).__name__}") from None
    if not isinstance(found, dict):
        raise BaseModelError(f"{file} is not a model's configuration")
    return found


def _new(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise ConfigurationError(f"{folder} exists and is not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
