"""Adapter folders: the loaded matrices are PEFT's, and everything else is refused in one line that says what to do."""

import copy
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from splitveil.adapters import Adapter, load_adapter
from splitveil.adapters.folder import CONFIG_FILE, MAX_CONFIG_BYTES, MAX_WEIGHTS_BYTES, WEIGHTS_FILE
from splitveil.errors import AdapterError, UnsupportedAdapterError

REAL_ADAPTERS = Path(__file__).resolve().parents[2].parent / "shared" / "lora"


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    torch.manual_seed(1)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=3, **shape))


@pytest.fixture(scope="module")
def gpt2() -> PreTrainedModel:
    torch.manual_seed(2)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def train(base: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32, **fields) -> Path:
    """Save an adapter of `base` in which neither A nor B is zero."""
    config = LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "r": 4, **fields})
    model = get_peft_model(copy.deepcopy(base), config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.to(dtype).save_pretrained(folder, save_embedding_layers=False)
    return folder


def peft_deltas(base: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """{module: (d_out, d_in)}: what PEFT adds to each weight after loading the folder."""
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default").T
        if layer.fan_in_fan_out
        else layer.get_delta_weight("default")
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def assert_same_as_peft(base: PreTrainedModel, folder: Path) -> Adapter:
    adapter, deltas = load_adapter(folder), peft_deltas(base, folder)
    assert {module.name for module in adapter.modules} == deltas.keys()
    for module in adapter.modules:
        expected = deltas[module.name].detach().numpy()
        assert np.abs(expected).max() > 0.1
        assert module.A.dtype == module.B.dtype == np.float32
        assert module.A.shape == (module.rank, module.d_in)
        assert module.B.shape == (module.d_out, module.rank)
        np.testing.assert_allclose(module.scale * module.B @ module.A, expected, rtol=1e-5, atol=1e-5)
    return adapter


# ---------------------------------------------------------------- equal to PEFT

ALL_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA_KINDS = {
    "plain": {},
    "alpha": {"lora_alpha": 5},
    "rslora": {"use_rslora": True, "lora_alpha": 6},
    "all modules": {"target_modules": ALL_LLAMA},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.layers\.[02]\.(self_attn\.q|mlp\.up)_proj"},
    "exclude": {"target_modules": ALL_LLAMA, "exclude_modules": ["layers.1.mlp.up_proj", "k_proj"]},
    "exclude regex": {"exclude_modules": r".*layers\.0\..*"},
    "layers": {"layers_to_transform": [0, 2]},
    "one layer": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "rank pattern": {"rank_pattern": {"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 7}},
    "alpha pattern": {"alpha_pattern": {"q_proj": 32, "layers.2.self_attn.v_proj": 3}},
    "overlapping patterns": {"alpha_pattern": {"q_proj": 32, r".*layers\.1\..*": 3, "proj": 5, r"[qv]_proj": 9}},
    "both patterns, rslora": {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"q_proj": 20}, "use_rslora": True},
    "dropout": {"lora_dropout": 0.3},
    "no task": {"task_type": None},
    "random start": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "eva": {"init_lora_weights": "eva"},
    "no whole modules": {"modules_to_save": []},
    "no replication": {"layer_replication": []},
    "no parameters": {"target_parameters": []},
    "rank above width": {"r": 40},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", LLAMA_KINDS)
def test_llama_adapters_are_those_of_peft(llama, tmp_path, kind):
    assert_same_as_peft(llama, train(llama, tmp_path, **LLAMA_KINDS[kind]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fan_in_fan_out", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["c_attn"]},
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "use_rslora": True, "rank_pattern": {"mlp.c_proj": 3}},
        {"target_modules": ["c_attn", "attn.c_proj"], "layers_to_transform": [1], "layers_pattern": "h"},
    ],
    ids=["plain", "rslora", "layer"],
)
def test_gpt2_adapters_are_those_of_peft(gpt2, tmp_path, fields, fan_in_fan_out):
    assert_same_as_peft(gpt2, train(gpt2, tmp_path, fan_in_fan_out=fan_in_fan_out, **fields))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_stored_values_are_kept_exactly(llama, tmp_path, dtype):
    train(llama, tmp_path, dtype)
    stored = safetensors.torch.load_file(tmp_path / WEIGHTS_FILE)
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    for module in assert_same_as_peft(llama, tmp_path).modules:
        for half in "AB":
            expected = stored[f"base_model.model.{module.name}.lora_{half}.weight"].float().numpy()
            np.testing.assert_array_equal(getattr(module, half), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_finite_16_bit_number_is_kept_exactly(tmp_path, dtype):
    everything = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    finite = everything[torch.isfinite(everything)]
    write(tmp_path, tensors={f"{Q}.lora_A.weight": finite[None, :], f"{Q}.lora_B.weight": torch.ones(3, 1)}, r=1)
    A = load_adapter(tmp_path).modules[0].A
    # Compared as bits, so that -0 and 0 count as two numbers.
    np.testing.assert_array_equal(A.view(np.uint32), finite.float().numpy().view(np.uint32)[None, :])


@pytest.mark.parametrize(
    ("folder", "modules", "scale", "base"),
    [("law-llm", 72, 2.0, "Qwen/Qwen2.5-3B-Instruct"), ("support-chatbot", 12, 2.0, "gpt2")],
)
def test_published_adapters_load(folder, modules, scale, base):
    path = REAL_ADAPTERS / folder
    if not path.is_dir():
        pytest.skip(f"the published adapter {folder!r} is not at hand (looked for ../shared/lora/{folder})")
    adapter = load_adapter(path)
    assert (len(adapter.modules), adapter.base_model) == (modules, base)
    assert {module.scale for module in adapter.modules} == {scale}
    stored = safetensors.torch.load_file(path / WEIGHTS_FILE)
    for module in adapter.modules:
        np.testing.assert_array_equal(module.B, stored[f"base_model.model.{module.name}.lora_B.weight"].numpy())


# ---------------------------------------------------------------- the loaded object

Q = "base_model.model.model.layers.0.self_attn.q_proj"


def pair(prefix: str = Q, rank: int = 4) -> dict[str, torch.Tensor]:
    return {f"{prefix}.lora_A.weight": torch.ones(rank, 6), f"{prefix}.lora_B.weight": torch.ones(5, rank)}


def write(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **fields) -> Path:
    """An adapter folder written by hand."""
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": "all-linear", "r": 4, **fields}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    safetensors.torch.save_file(pair() if tensors is None else tensors, folder / WEIGHTS_FILE)
    return folder


def test_modules_come_in_the_order_of_the_blocks(tmp_path):
    names = [f"model.layers.{block}.self_attn.{part}_proj" for block in (0, 2, 10) for part in "qv"]
    tensors = {key: value for name in reversed(names) for key, value in pair(f"base_model.model.{name}").items()}
    assert [module.name for module in load_adapter(write(tmp_path, tensors)).modules] == names


def test_an_adapter_name_in_the_keys_is_accepted(tmp_path):
    tensors = {key.replace(".weight", ".default.weight"): value for key, value in pair().items()}
    (module,) = load_adapter(write(tmp_path, tensors)).modules
    assert (module.name, module.rank, module.d_in, module.d_out) == ("model.layers.0.self_attn.q_proj", 4, 6, 5)


def test_what_is_loaded_cannot_be_changed(tmp_path):
    adapter = load_adapter(write(tmp_path))
    (module,) = adapter.modules
    with pytest.raises(dataclasses.FrozenInstanceError):
        module.scale = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        adapter.modules = ()
    for matrix in (module.A, module.B):
        with pytest.raises(ValueError, match="read-only"):
            matrix[0, 0] = 1.0


def test_repr_shows_no_weights(tmp_path):
    tensors = {key: torch.full_like(value, 0.734375) for key, value in pair().items()}
    adapter = load_adapter(write(tmp_path, tensors, lora_alpha=1.1))
    for text in (repr(adapter), str(adapter), f"{adapter.modules[0]}"):
        assert "q_proj" in text
        assert "rank=4" in text
        assert "0.73" not in text
        assert "array" not in text


def test_the_digest_changes_with_either_file(tmp_path):
    digests = [load_adapter(write(tmp_path)).digest]
    assert len(bytes.fromhex(digests[0])) == 32
    assert load_adapter(tmp_path).digest == digests[0]
    digests.append(load_adapter(write(tmp_path, revision="main")).digest)
    tensors = {key: 2 * value for key, value in pair().items()}
    digests.append(load_adapter(write(tmp_path, tensors)).digest)
    assert len(set(digests)) == 3


def test_a_path_may_be_a_string(tmp_path):
    assert load_adapter(str(write(tmp_path))).path == tmp_path


def test_neither_torch_nor_peft_is_imported():
    code = "import sys, splitveil.adapters; print({'torch', 'peft', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


# ---------------------------------------------------------------- refused


def refused(folder: Path, *expected: str, kind: type[AdapterError] = AdapterError) -> None:
    """Loading fails with exactly this kind of error, in one line that holds the expected parts."""
    with pytest.raises(AdapterError) as error:
        load_adapter(folder)
    message = str(error.value)
    assert type(error.value) is kind, message
    assert "\n" not in message
    assert message.startswith(str(folder))
    assert len(message) < len(str(folder)) + 500
    assert ";" in message or "(" in message
    for part in expected:
        assert part in message


def test_no_folder(tmp_path):
    refused(tmp_path / "none", "no such folder")


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "adapter").write_text("")
    refused(tmp_path / "adapter", "no such folder")


def test_a_path_that_the_system_refuses(tmp_path):
    refused(tmp_path / ("x" * 1000), "cannot be read (File name too long)")


def test_missing_files(tmp_path):
    refused(tmp_path, CONFIG_FILE, "missing")
    write(tmp_path)
    (tmp_path / WEIGHTS_FILE).unlink()
    refused(tmp_path, WEIGHTS_FILE, "missing")


def test_a_sub_folder_is_pointed_at(tmp_path):
    (tmp_path / "clinic").mkdir()
    write(tmp_path / "clinic")
    refused(tmp_path, "did you mean its sub-folder 'clinic'")


def test_a_pickle_is_refused_and_not_opened(llama, tmp_path):
    model = get_peft_model(copy.deepcopy(llama), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.save_pretrained(tmp_path, safe_serialization=False, save_embedding_layers=False)
    refused(tmp_path, "pickle", "save it again with safetensors", kind=UnsupportedAdapterError)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_file(tmp_path):
    (write(tmp_path) / WEIGHTS_FILE).chmod(0)
    refused(tmp_path, "cannot be read")


def test_an_unreadable_configuration(tmp_path):
    (write(tmp_path) / CONFIG_FILE).write_text("{")
    refused(tmp_path, "not JSON")


@pytest.mark.parametrize(("file", "limit"), [(CONFIG_FILE, MAX_CONFIG_BYTES), (WEIGHTS_FILE, MAX_WEIGHTS_BYTES)])
def test_excessive_files_are_not_read(tmp_path, file, limit):
    write(tmp_path)
    # Sparse: it takes no space on the disk.
    os.truncate(tmp_path / file, limit + 1)
    refused(tmp_path, file, f"{limit + 1} bytes", f"at most {limit}")


@pytest.mark.parametrize("damage", ["empty", "truncated", "header", "longer", "text"])
def test_damaged_safetensors(tmp_path, damage):
    file = write(tmp_path) / WEIGHTS_FILE
    whole = file.read_bytes()
    damaged = {
        "empty": b"",
        "truncated": whole[:-1],
        "header": whole[:40],
        "longer": whole + b"\0",
        "text": b"version https://git-lfs.github.com/spec/v1\n",
    }
    file.write_bytes(damaged[damage])
    refused(tmp_path, "not a complete safetensors file")


def test_no_tensors(tmp_path):
    refused(write(tmp_path, tensors={}), "no LoRA tensors")


@pytest.mark.parametrize(("missing", "present"), [("A", "B"), ("B", "A")])
def test_half_a_pair(tmp_path, missing, present):
    tensors = pair()
    del tensors[f"{Q}.lora_{missing}.weight"]
    refused(write(tmp_path, tensors), "q_proj", f"has lora_{present} but no lora_{missing}")


def test_two_adapters_in_one_file(tmp_path):
    named = {key.replace(".weight", ".other.weight"): value for key, value in pair().items()}
    refused(write(tmp_path, {**pair(), **named}), "several adapters", "'other'")


FOREIGN = {
    "base_model.model.model.embed_tokens.lora_embedding_A": "embedding",
    "base_model.model.model.embed_tokens.lora_embedding_B": "embedding",
    f"{Q}.lora_magnitude_vector": "DoRA",
    f"{Q}.lora_magnitude_vector.weight": "DoRA",
    f"{Q}.lora_diag": "KaSA",
    f"{Q}.lora_B.bias": "bias",
    f"{Q}.bias": "bias",
    f"{Q}.base_layer.weight": "base model",
    f"{Q}.base_layer.lora_A.weight": "nested",
    "base_model.model.lm_head.modules_to_save.weight": "modules_to_save",
    "base_model.model.lm_head.weight": "save_embedding_layers=False",
    "base_model.model.model.embed_tokens.weight": "save_embedding_layers=False",
    "base_model.model.model.embed_tokens.trainable_tokens_delta": "trainable_token_indices",
    f"{Q}.weight": "save only the LoRA tensors",
    "model.layers.0.self_attn.q_proj.lora_A.weight": "save only the LoRA tensors",
    f"{Q}.lora_A.one.two.weight": "save only the LoRA tensors",
    f"{Q}.lora_C.weight": "save only the LoRA tensors",
    f"{Q}.lora_A": "save only the LoRA tensors",
    f"{Q}\x1b[2J\n.lora_A.weight": "save only the LoRA tensors",
    f"{Q}..lora_A.weight": "save only the LoRA tensors",
    "base_model.model.lora_A.weight": "save only the LoRA tensors",
    f"base_model.model.{'x' * 300}.lora_A.weight": "at most 256 characters",
}


@pytest.mark.parametrize("key", FOREIGN, ids=lambda key: repr(key)[-40:])
def test_other_tensors_are_refused_by_name(tmp_path, key):
    write(tmp_path, {**pair(), key: torch.ones(4, 6)})
    refused(tmp_path, repr(key[:200]), FOREIGN[key], kind=UnsupportedAdapterError)


@pytest.mark.parametrize("module", ["lm_head", "embed_out", "transformer.output_layer", "output", "score"])
def test_the_head_is_refused(tmp_path, module):
    write(tmp_path, {**pair(), **pair(f"base_model.model.{module}")})
    refused(tmp_path, repr(module), "is the head", kind=UnsupportedAdapterError)


@pytest.mark.parametrize("module", ["model.embed_tokens", "transformer.wte", "transformer.embedding.word_embeddings"])
def test_an_embedding_is_refused(tmp_path, module):
    write(tmp_path, {**pair(), **pair(f"base_model.model.{module}")})
    refused(tmp_path, repr(module), "is an embedding", kind=UnsupportedAdapterError)


def test_a_module_called_output_within_a_block_is_not_the_head(tmp_path):
    load_adapter(write(tmp_path, pair("base_model.model.model.layers.0.attention.output")))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "'lm_head' is the head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding_A"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"bias": "lora_only"}, "bias"),
        ({"init_lora_weights": "pissa"}, "convert to plain LoRA first"),
        ({"init_lora_weights": "olora"}, "convert to plain LoRA first"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_peft_writes_for_other_methods_is_refused(llama, tmp_path, fields, expected):
    refused(train(llama, tmp_path, **fields), expected, kind=UnsupportedAdapterError)


def test_pissa_is_served_after_conversion(llama, tmp_path):
    """The advice in the message works: the converted adapter adds to the public base what training added."""
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2, init_lora_weights="pissa")
    model = get_peft_model(copy.deepcopy(llama), config)
    # As PEFT's documentation has it: the start is saved as if it were plain, and PEFT cannot reach it otherwise.
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start", save_embedding_layers=False)
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter))
    target = tmp_path / "converted"
    model.save_pretrained(
        target, path_initial_model_for_weight_conversion=str(tmp_path / "start"), save_embedding_layers=False
    )
    merged = model.merge_and_unload().state_dict()
    for module in assert_same_as_peft(llama, target).modules:
        served = llama.state_dict()[f"{module.name}.weight"].numpy() + module.scale * module.B @ module.A
        np.testing.assert_allclose(served, merged[f"{module.name}.weight"].numpy(), atol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["v_proj"]},
        {"target_modules": "q_proj"},
        {"exclude_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    ],
    ids=json.dumps,
)
def test_tensors_that_the_configuration_does_not_target(tmp_path, fields):
    refused(write(tmp_path, **fields), "model.layers.0.self_attn.q_proj", "would not adapt it under target_modules")


@pytest.mark.parametrize("fields", [{"r": 8}, {"rank_pattern": {"q_proj": 2}}])
def test_another_rank_than_configured(tmp_path, fields):
    refused(write(tmp_path, **fields), "q_proj", "A [4, 6] and B [5, 4]", "expected rank")


def test_a_and_b_of_different_ranks(tmp_path):
    tensors = {**pair(), f"{Q}.lora_B.weight": torch.ones(5, 3)}
    refused(write(tmp_path, tensors), "A [4, 6] and B [5, 3]", "expected rank 4")


def test_transposed_matrices(tmp_path):
    tensors = {key: value.T.contiguous() for key, value in pair().items()}
    refused(write(tmp_path, tensors), "A [6, 4] and B [4, 5]")


@pytest.mark.parametrize("half", ["A", "B"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_that_are_not_finite(tmp_path, half, value, dtype):
    tensors = {key: value.to(dtype) for key, value in pair().items()}
    tensors[f"{Q}.lora_{half}.weight"][2, 1] = value
    refused(write(tmp_path, tensors), f"lora_{half}", "NaN or infinity")


@pytest.mark.parametrize("shape", [(), (4,), (1, 4, 6), (4, 6, 1, 1)])
def test_tensors_that_are_not_matrices(tmp_path, shape):
    tensors = {**pair(), f"{Q}.lora_A.weight": torch.ones(shape)}
    refused(write(tmp_path, tensors), "lora_A", str(list(shape)), kind=UnsupportedAdapterError)


@pytest.mark.parametrize("shape", [(0, 6), (4, 0)])
def test_empty_matrices(tmp_path, shape):
    tensors = {**pair(), f"{Q}.lora_A.weight": torch.ones(shape)}
    refused(write(tmp_path, tensors), "lora_A", "no values")


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64]
)
def test_other_dtypes(tmp_path, dtype):
    tensors = {**pair(), f"{Q}.lora_A.weight": torch.ones(4, 6).to(dtype)}
    refused(write(tmp_path, tensors), "lora_A", "dtype", kind=UnsupportedAdapterError)
