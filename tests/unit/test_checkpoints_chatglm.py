"""ChatGLM checkpoints under transformers' names: the same logits as the original computation, written out here."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM

from splitveil.adapters import load_adapter
from splitveil.checkpoints import convert_adapter, convert_model
from splitveil.cli import cli
from splitveil.errors import AdapterError, BaseModelError, ConfigurationError, SplitveilError
from splitveil.serving.publishing import layer_specs

BLOCKS, HEADS, GROUPS, HEAD, HIDDEN, INNER, VOCABULARY = 2, 4, 2, 8, 24, 40, 50
ROWS = (HEADS * HEAD, GROUPS * HEAD, GROUPS * HEAD)
CONFIG = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "ffn_hidden_size": INNER,
    "hidden_size": HIDDEN,
    "kv_channels": HEAD,
    "layernorm_epsilon": 1e-5,
    "multi_query_attention": True,
    "multi_query_group_num": GROUPS,
    "num_attention_heads": HEADS,
    "num_layers": BLOCKS,
    "original_rope": True,
    "padded_vocab_size": VOCABULARY,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 64,
    "torch_dtype": "float32",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def original_weights() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw) * 0.3

    weights = {
        "transformer.embedding.word_embeddings.weight": normal(VOCABULARY, HIDDEN),
        "transformer.rotary_pos_emb.inv_freq": 1 / 10000 ** (torch.arange(0, HEAD // 2, 2) / (HEAD // 2)),
        "transformer.encoder.final_layernorm.weight": 1 + normal(HIDDEN),
        "transformer.output_layer.weight": normal(VOCABULARY, HIDDEN),
    }
    for block in range(BLOCKS):
        at = f"transformer.encoder.layers.{block}."
        weights |= {
            f"{at}input_layernorm.weight": 1 + normal(HIDDEN),
            f"{at}post_attention_layernorm.weight": 1 + normal(HIDDEN),
            f"{at}self_attention.query_key_value.weight": normal(sum(ROWS), HIDDEN),
            f"{at}self_attention.query_key_value.bias": normal(sum(ROWS)),
            f"{at}self_attention.dense.weight": normal(HIDDEN, HEADS * HEAD),
            f"{at}mlp.dense_h_to_4h.weight": normal(2 * INNER, HIDDEN),
            f"{at}mlp.dense_4h_to_h.weight": normal(HIDDEN, INNER),
        }
    return weights


def original_logits(weights: dict[str, Tensor], ids: Tensor, ratio: float = 1.0) -> Tensor:
    """The original model: ids (length,) to logits (length, vocabulary), one sequence, no cache."""

    def norm(x: Tensor, scale: Tensor) -> Tensor:
        return scale * x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5)

    length = len(ids)
    half = HEAD // 2
    angles = torch.outer(torch.arange(length).float(), 1 / (10000 * ratio) ** (torch.arange(0, half, 2) / half))

    def rotated(x: Tensor) -> Tensor:  # (length, heads, HEAD): pairs (0, 1), (2, 3), … of the first half turn
        pairs = torch.view_as_complex(x[..., :half].reshape(length, -1, half // 2, 2).contiguous())
        turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)
        return torch.cat([turned, x[..., half:]], dim=-1)

    x = weights["transformer.embedding.word_embeddings.weight"][ids]
    mask = torch.full((length, length), -math.inf).triu(1)
    for block in range(BLOCKS):
        at = f"transformer.encoder.layers.{block}."
        y = norm(x, weights[f"{at}input_layernorm.weight"])
        mixed = y @ weights[f"{at}self_attention.query_key_value.weight"].T
        mixed = mixed + weights[f"{at}self_attention.query_key_value.bias"]
        q, k, v = (part.reshape(length, -1, HEAD) for part in mixed.split(ROWS, dim=-1))
        q, k = rotated(q), rotated(k)
        heads = []
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            scores = q[:, head] @ k[:, group].T / math.sqrt(HEAD) + mask
            heads.append(scores.softmax(-1) @ v[:, group])
        x = x + torch.cat(heads, dim=-1) @ weights[f"{at}self_attention.dense.weight"].T
        y = norm(x, weights[f"{at}post_attention_layernorm.weight"])
        gate, up = (y @ weights[f"{at}mlp.dense_h_to_4h.weight"].T).chunk(2, dim=-1)
        x = x + (silu(gate) * up) @ weights[f"{at}mlp.dense_4h_to_h.weight"].T
    x = norm(x, weights["transformer.encoder.final_layernorm.weight"])
    return x @ weights["transformer.output_layer.weight"].T


def write(folder: Path, weights: dict[str, Tensor], **changes: Any) -> Path:
    """A checkpoint in two files."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (CONFIG | changes).items() if v != "absent"}))
    names = sorted(weights)
    for part, some in enumerate((names[::2], names[1::2]), start=1):
        tensors = {name: weights[name].contiguous() for name in some}
        save_file(tensors, folder / f"model-{part:05}-of-00002.safetensors")
    return folder


def logits(folder: Path, ids: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(model).__name__ == "GlmForCausalLM"
    with torch.no_grad():
        result: Tensor = model(ids[None]).logits[0]
    return result


IDS = torch.tensor([3, 17, 42, 8, 8, 30, 1, 49])


def test_the_converted_model_computes_what_the_original_does(tmp_path: Path) -> None:
    weights = original_weights()
    source = write(tmp_path / "original", weights, rope_ratio=1)
    seen: list[tuple[int, int]] = []
    convert_model(source, tmp_path / "converted", lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    got, expected = logits(tmp_path / "converted", IDS), original_logits(weights, IDS)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    # The comparison would see a wrong pairing of rotary positions or a wrong share of the heads.
    assert (original_logits(weights, IDS, 2.0) - expected).abs().max() > 5e-3


def test_weights_keep_their_bits_and_dtype(tmp_path: Path) -> None:
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in original_weights().items()}
    convert_model(write(tmp_path / "original", weights), tmp_path / "converted")
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    tensors = {}
    for file in (tmp_path / "converted").glob("*.safetensors"):
        tensors |= load_file(file)
    parts = [tensors[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(torch.cat(parts), weights["transformer.encoder.layers.1.self_attention.query_key_value.weight"])
    assert [len(part) for part in parts] == list(ROWS)


def write_adapter(folder: Path, names: dict[str, tuple[int, int]], **changes: Any) -> Path:
    """A PEFT adapter of rank 3 on modules (name → inputs, outputs)."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(1)
    tensors = {}
    for name, (inputs, outputs) in names.items():
        at = f"base_model.model.{name}"
        tensors[f"{at}.lora_A.weight"] = torch.randn(3, inputs, generator=draw)
        tensors[f"{at}.lora_B.weight"] = torch.randn(outputs, 3, generator=draw) * 0.1
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 6,
        "target_modules": sorted({name.rpartition(".")[2] for name in names}),
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings | changes))
    return folder


FUSED = {
    f"transformer.encoder.layers.{block}.self_attention.query_key_value": (HIDDEN, sum(ROWS)) for block in range(BLOCKS)
}
EVERYWHERE = FUSED | {
    f"transformer.encoder.layers.{block}.{name}": shape
    for block in range(BLOCKS)
    for name, shape in {
        "self_attention.dense": (HEADS * HEAD, HIDDEN),
        "mlp.dense_h_to_4h": (HIDDEN, 2 * INNER),
        "mlp.dense_4h_to_h": (INNER, HIDDEN),
    }.items()
}


@pytest.mark.parametrize("modules", [FUSED, EVERYWHERE], ids=["fused", "everywhere"])
def test_a_converted_adapter_does_to_the_converted_model_what_the_original_does(
    tmp_path: Path, modules: dict[str, tuple[int, int]]
) -> None:
    weights = original_weights()
    source = write(tmp_path / "original", weights)
    adapter = write_adapter(tmp_path / "adapter", modules)
    convert_model(source, tmp_path / "converted")
    for base in ("original", "converted"):
        convert_adapter(adapter, tmp_path / f"for-{base}", tmp_path / base)
    merged = dict(weights)
    for module in load_adapter(adapter).modules:
        merged[f"{module.name}.weight"] = merged[f"{module.name}.weight"] + module.scale * torch.tensor(
            module.B @ module.A
        )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", dtype=torch.float32).eval()
    with torch.no_grad():
        plain = model(IDS[None]).logits[0]
        adapted = PeftModel.from_pretrained(model, tmp_path / "for-converted").eval()(IDS[None]).logits[0]
    expected = original_logits(merged, IDS)
    torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-4)
    assert (plain - expected).abs().max() > 0.1
    same = [(tmp_path / f"for-{base}/adapter_model.safetensors").read_bytes() for base in ("original", "converted")]
    assert same[0] == same[1]


def test_the_three_parts_of_a_fused_projection_are_one_private_layer(tmp_path: Path) -> None:
    source = write(tmp_path / "original", original_weights())
    convert_adapter(write_adapter(tmp_path / "adapter", FUSED), tmp_path / "new", source)
    original = load_adapter(tmp_path / "adapter").modules
    specs = layer_specs(load_adapter(tmp_path / "new").modules)
    rows = dict(zip(("q_proj", "k_proj", "v_proj"), np.split(original[0].B, np.cumsum(ROWS)[:-1]), strict=True))
    assert [{name.rpartition(".")[2] for name, _ in spec.outputs} for spec in specs] == [set(rows)] * BLOCKS
    stacked = np.vstack([rows[name.rpartition(".")[2]] for name, _ in specs[0].outputs])
    np.testing.assert_array_equal(specs[0].B, stacked)


def broken(tmp_path: Path, what: str) -> Path:
    weights = original_weights()
    name = "transformer.encoder.layers.1.self_attention.query_key_value.weight"
    if what == "missing":
        del weights[name]
    elif what == "rows":
        weights[name] = weights[name][:-1]
    elif what == "foreign":
        weights["transformer.prefix_encoder.embedding.weight"] = torch.zeros(2, 2)
    elif what == "block":
        weights["transformer.encoder.layers.7.mlp.dense_4h_to_h.weight"] = torch.zeros(2, 2)
    folder = write(tmp_path / "original", weights)
    if what == "garbage":
        (folder / "model-00001-of-00002.safetensors").write_bytes(b"no such thing")
    return folder


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("missing", r"lacks \d+ tensors?"),
        ("rows", "has 63 rows, expected 64"),
        ("foreign", "is no tensor of a ChatGLM model"),
        ("block", "no tensor of a ChatGLM model of 2 blocks"),
        ("garbage", "cannot be read as weights"),
    ],
)
def test_a_broken_checkpoint_is_a_clear_error_and_no_model(tmp_path: Path, what: str, words: str) -> None:
    with pytest.raises(BaseModelError, match=words):
        convert_model(broken(tmp_path, what), tmp_path / "converted")
    assert not (tmp_path / "converted" / "config.json").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama"}, "a ChatGLM checkpoint was expected"),
        ({"add_qkv_bias": "absent"}, "add_qkv_bias is None"),
        ({"add_bias_linear": True}, "another architecture"),
        ({"quantization_bit": 4}, "quantization_bit is 4"),
        ({"layernorm_epsilon": None}, "layernorm_epsilon is None"),
        ({"rope_ratio": "x"}, "rope_ratio is 'x'"),
        ({"rope_ratio": 50}, "different things"),
        ({"num_layers": "28"}, "num_layers is '28'"),
        ({"multi_query_group_num": 3}, "4 heads cannot share 3 groups"),
    ],
)
def test_another_architecture_is_refused_by_name(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    source = write(tmp_path / "original", original_weights(), **change)
    with pytest.raises(BaseModelError, match=words):
        convert_model(source, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_pickles_are_not_read(tmp_path: Path) -> None:
    source = write(tmp_path / "original", {})
    for file in source.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(BaseModelError, match="holds no weights"):
        convert_model(source, tmp_path / "converted")
    (source / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(BaseModelError, match="pickles"):
        convert_model(source, tmp_path / "converted")


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    source = write(tmp_path / "original", original_weights())
    convert_model(source, tmp_path / "converted")
    with pytest.raises(ConfigurationError, match="exists and is not empty"):
        convert_model(source, tmp_path / "converted")


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        ({"model.layers.0.self_attn.q_proj": (HIDDEN, 32)}, "no block of a ChatGLM model"),
        ({"transformer.encoder.layers.9.self_attention.dense": (32, HIDDEN)}, "no block of a ChatGLM model of 2"),
        (
            {"transformer.encoder.layers.0.self_attention.query_key_value": (HIDDEN, 60)},
            "60 outputs, the base model 64",
        ),
        ({"transformer.encoder.layers.0.mlp.other": (HIDDEN, 60)}, "no linear module"),
    ],
)
def test_an_adapter_of_something_else_is_refused(
    tmp_path: Path, modules: dict[str, tuple[int, int]], words: str
) -> None:
    source = write(tmp_path / "original", original_weights())
    with pytest.raises(AdapterError, match=words):
        convert_adapter(write_adapter(tmp_path / "adapter", modules), tmp_path / "new", source)


def test_the_command_line(tmp_path: Path) -> None:
    source = write(tmp_path / "original", original_weights())
    adapter = write_adapter(tmp_path / "adapter", FUSED)
    runner = CliRunner()
    done = runner.invoke(cli, ["convert", str(source), str(tmp_path / "model")], catch_exceptions=False)
    assert (done.exit_code, done.stdout) == (0, f"wrote {tmp_path / 'model'}\n")
    arguments = ["convert", str(adapter), str(tmp_path / "lora")]
    with pytest.raises(SplitveilError, match="--base DIR"):
        runner.invoke(cli, arguments, standalone_mode=False, catch_exceptions=False)
    done = runner.invoke(cli, [*arguments, "--base", str(tmp_path / "model")], catch_exceptions=False)
    assert done.exit_code == 0
    assert len(load_adapter(tmp_path / "lora").modules) == 3 * BLOCKS
    (tmp_path / "empty").mkdir()
    with pytest.raises(SplitveilError, match="neither a model"):
        runner.invoke(
            cli,
            ["convert", str(tmp_path / "empty"), str(tmp_path / "x")],
            standalone_mode=False,
            catch_exceptions=False,
        )
