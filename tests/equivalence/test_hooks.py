"""What connecting adds to a model, what it shares, and that nothing of it stays."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import GPT2Config, GPTNeoXConfig, PhiConfig

from equivalence.support import (
    RANDOM_LIMIT,
    Case,
    Served,
    draw_case,
    greedy,
    judge,
    logits,
    private,
    published,
    random_model,
    random_prompts,
    report,
    served_by_both,
    server,
    tiny_llama,
    tolerance,
)
from splitveil import connect, disconnect
from splitveil.errors import BaseModelError, ConfigurationError, NonFiniteError
from splitveil.serving.connect import connection
from splitveil.serving.sites import SiteLearner

Record = Callable[[str, object], None]


def all_linear() -> LoraConfig:
    """A new one each time: PEFT writes the modules that it found into it."""
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    base = random_model(tiny_llama())
    folder = tmp_path_factory.mktemp("adapter")
    with served_by_both({"a": draw_case(base, folder, all_linear(), random_prompts(base, 8, 8), 16)}) as both:
        yield both


def check_equal(case: Case, model: nn.Module) -> None:
    """Two passes, of which the second at the latest is grouped, both equal to plaintext PEFT."""
    for _ in range(2):
        case.judge(logits(model, case.sequences)).check(RANDOM_LIMIT)


def hooks_of(model: nn.Module) -> dict[str, list[object]]:
    """Every hook of every module, with its number, by the name of PyTorch's table."""
    return {
        f"{name}.{table}": list(value.items())
        for name, module in model.named_modules()
        for table, value in vars(module).items()
        if "hook" in table and hasattr(value, "items")
    }


# -- nothing stays -----------------------------------------------------------------------------------------------------


def test_disconnect_leaves_the_model_as_it_was(served: Served, engine: str) -> None:
    base = copy.deepcopy(served.case.base)
    calls = []
    # Somebody else's hooks, from before and from while the model is connected, stay and are called as ever.
    layer = base.get_submodule("model.layers.0.self_attn.q_proj")
    layer.register_forward_hook(lambda *_: calls.append("before"))
    hooks, classes = hooks_of(base), [type(m) for m in base.modules()]
    weights = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in base.state_dict().items()}
    keys, outputs = list(base.state_dict()), logits(base, served.case.sequences)
    tokens = greedy(base, served.case.prompts, 8)

    for _ in range(2):
        model = connect(base, served.servers[engine].address, "a", allow_insecure=True)
        assert model is base
        assert not torch.equal(logits(model, served.case.sequences), outputs)
        assert list(model.state_dict()) == keys
        assert [type(m) for m in model.modules()] == classes
        assert hooks_of(model) != hooks
        disconnect(model)

        assert hooks_of(base) == hooks
        assert list(base.state_dict()) == keys
        for name, tensor in base.state_dict().items():
            pointer, values = weights[name]
            assert tensor.data_ptr() == pointer
            assert torch.equal(tensor, values)
        assert torch.equal(logits(base, served.case.sequences), outputs)
        assert torch.equal(greedy(base, served.case.prompts, 8), tokens)
        assert vars(base).keys() == vars(served.case.base).keys()
    assert calls


def test_hooks_of_others_that_come_meanwhile_stay(served: Served) -> None:
    base = copy.deepcopy(served.case.base)
    layer = base.get_submodule("model.layers.0.self_attn.q_proj")
    seen = []
    with served.connected("lattice", base=base) as model:
        layer.register_forward_hook(lambda module, args, output: seen.append(output))
        served.case.judge(logits(model, served.case.sequences)).check(RANDOM_LIMIT)
    logits(base, served.case.sequences)
    # It came later, so it sees the adapted output; afterwards the base's.
    assert len(seen) == 2
    assert not torch.equal(seen[0], seen[1])
    assert [len(hooks) for table, hooks in hooks_of(base).items() if hooks] == [1]


def test_disconnecting_what_is_not_connected_does_nothing(served: Served) -> None:
    disconnect(served.case.base)
    disconnect(nn.Linear(2, 2))


def test_connecting_twice_is_refused_and_harmless(served: Served, engine: str) -> None:
    case = served.case
    with served.connected(engine) as model:
        with pytest.raises(ConfigurationError, match="connected already"):
            connect(model, served.servers[engine].address, "a", allow_insecure=True)
        check_equal(case, model)


# -- sites -------------------------------------------------------------------------------------------------------------


def expected_groups(family: str) -> list[tuple[str, ...]]:
    """Modules of one block that read one tensor, in the order of their calls."""
    return {
        "llama": [
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.down_proj",),
        ],
        # Attention and MLP are parallel in Phi and read the same normalised state.
        "phi": [
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"),
            ("self_attn.dense",),
            ("mlp.fc2",),
        ],
        # They are parallel in GPT-NeoX too, but behind two norms.
        "gpt_neox": [
            ("attention.query_key_value",),
            ("attention.dense",),
            ("mlp.dense_h_to_4h",),
            ("mlp.dense_4h_to_h",),
        ],
        "gpt2": [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)],
    }[family]


_TINY = {
    "vocab_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS = {
    "llama": tiny_llama(),
    "phi": PhiConfig(**_TINY, hidden_size=64, intermediate_size=96),
    "gpt_neox": GPTNeoXConfig(**_TINY, hidden_size=64, intermediate_size=96),
    "gpt2": GPT2Config(**_TINY, n_embd=64),
}
BLOCKS = {"llama": "model.layers", "phi": "model.layers", "gpt_neox": "gpt_neox.layers", "gpt2": "transformer.h"}


@pytest.mark.parametrize("name", CONFIGS)
def test_modules_that_read_one_tensor_share_one_query(name: str, engine: str, tmp_path: Path) -> None:
    base = random_model(CONFIGS[name])
    prompts = random_prompts(base, 2, 6)
    case = draw_case(base, tmp_path, all_linear(), prompts, 4)
    expected = [
        tuple(f"{BLOCKS[name]}.{block}.{module}" for module in group)
        for block in range(2)
        for group in expected_groups(name)
    ]
    with server({"a": tmp_path}, engine) as running, private(case.base, running.address) as model:
        traffic = connection(model).session.traffic
        assert connection(model).groups == []
        logits(model, prompts)
        assert connection(model).groups == expected
        assert traffic.queries == sum(map(len, expected))
        before = traffic.queries
        greedy(model, prompts, 3)
        assert traffic.queries - before == 3 * len(expected)
        assert traffic.rows == 2 * (6 * sum(map(len, expected)) + (6 + 1 + 1) * len(expected))


def test_grouping_changes_the_cost_and_not_the_result(
    served: Served, engine: str, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    case = served.case
    with served.connected(engine) as model:
        logits(model, case.sequences)
        grouped = logits(model, case.sequences)
        with_groups = connection(model).session.traffic.queries
    learned = SiteLearner.groups
    monkeypatch.setattr(SiteLearner, "groups", lambda self: [(name,) for group in learned(self) for name in group])
    with served.connected(engine) as model:
        logits(model, case.sequences)
        alone = logits(model, case.sequences)
        without_groups = connection(model).session.traffic.queries
        assert all(len(group) == 1 for group in connection(model).groups)
    assert (with_groups, without_groups) == (14 + 8, 14 + 14)
    for name, answer in (("grouped", grouped), ("one query a module", alone)):
        verdict = case.judge(answer)
        report(record_property, name, verdict)
        verdict.check(RANDOM_LIMIT)
    if engine == "plain":
        assert torch.equal(grouped, alone)


def test_modules_with_the_same_a_share_one_core(engine: str, tmp_path: Path, record_property: Record) -> None:
    """As when a fused projection was trained and its B cut into q, k and v; gate and up stand for another scale."""

    def share(peft: PeftModel) -> None:
        for block in peft.base_model.model.model.layers:
            q, k, v = (getattr(block.self_attn, name).lora_A["default"] for name in ("q_proj", "k_proj", "v_proj"))
            k.weight.data.copy_(q.weight.data)
            v.weight.data.copy_(q.weight.data)
            block.mlp.gate_proj.lora_A["default"].weight.data.copy_(block.mlp.up_proj.lora_A["default"].weight.data)

    base = random_model(tiny_llama())
    lora = all_linear()
    lora.alpha_pattern = {"up_proj": 3}
    case = draw_case(base, tmp_path, lora, random_prompts(base, 8, 8), 8, prepare=share)
    layers = published(tmp_path, engine).publication.layers
    shared = [[name.rpartition(".")[2] for name, _ in layer.outputs] for layer in layers]
    assert sorted(map(sorted, shared)) == sorted(
        2 * [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj"], ["up_proj"], ["down_proj"]]
    )
    with served_by_both({"a": case}) as served, served.connected(engine) as model:
        for _ in range(2):
            verdict = case.judge(logits(model, case.sequences))
            report(record_property, "one core for q, k, v", verdict)
            verdict.check(RANDOM_LIMIT)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_a_tensor_changed_in_place_is_another_tensor(served: Served, engine: str, mode: type) -> None:
    """k reads what q read, changed in place: with the identity alone it would get the answer for the old values."""
    case = served.case
    base, peft = copy.deepcopy(case.base), copy.deepcopy(case.peft)

    def doubles(module: nn.Module, args: object, kwargs: dict[str, Tensor], output: Tensor) -> None:
        (args[0] if args else kwargs["input"]).mul_(2)

    with served.connected(engine, base=base) as model, mode():
        model(input_ids=case.sequences)
        for block in model.model.layers:
            block.self_attn.q_proj.register_forward_hook(doubles, with_kwargs=True)
        got = model(input_ids=case.sequences, use_cache=False).logits.clone()
    for block in peft.base_model.model.model.layers:
        block.self_attn.q_proj.register_forward_hook(doubles, with_kwargs=True)
    plaintext = logits(peft, case.sequences)
    assert not torch.equal(plaintext.argmax(-1), case.plaintext.argmax(-1))
    judge(got, plaintext, tolerance(peft, case.sequences)).check(RANDOM_LIMIT)


# -- what does not fit -------------------------------------------------------------------------------------------------


def bypassed(mlp: nn.Module) -> None:
    """An MLP in the style of a fused kernel: it reads ``up_proj.weight`` and never calls the module."""

    def fused(x: Tensor) -> Tensor:
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * nn.functional.linear(x, mlp.up_proj.weight))

    mlp.forward = fused


def test_an_adapted_module_that_is_never_called_is_an_error(served: Served, engine: str) -> None:
    case = served.case
    base = copy.deepcopy(case.base)
    bypassed(base.model.layers[1].mlp)
    outputs = logits(base, case.sequences)
    with served.connected(engine, base=base) as model:
        for _ in range(2):
            with pytest.raises(BaseModelError, match=r"1 of 14 .*model\.layers\.1\.mlp\.up_proj"):
                logits(model, case.sequences)
        with pytest.raises(BaseModelError, match="not called"):
            greedy(model, case.prompts, 4)
    assert torch.equal(logits(base, case.sequences), outputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, r"maps \d+ to 32 features, the adapter \d+ to 64; it is for another base model"),
        ({"num_hidden_layers": 1}, r"no module model\.layers\.1\.\S+; the adapter is for another base model"),
        ({"intermediate_size": 80}, r"another base model"),
    ],
    ids=["width", "blocks", "features"],
)
def test_another_base_model_is_refused(served: Served, changes: dict[str, int], message: str) -> None:
    other = random_model(tiny_llama(**changes))
    hooks = hooks_of(other)
    with pytest.raises(BaseModelError, match=message):
        connect(other, served.servers["lattice"].address, "a")
    assert hooks_of(other) == hooks
    disconnect(other)


def test_another_architecture_is_refused(served: Served) -> None:
    with pytest.raises(BaseModelError, match="no module"):
        connect(random_model(CONFIGS["gpt2"]), served.servers["lattice"].address, "a")


def test_training_is_refused_and_inference_goes_on(served: Served, engine: str) -> None:
    case = served.case
    base = copy.deepcopy(case.base)
    with served.connected(engine, base=base) as model:
        model.train()
        with pytest.raises(ConfigurationError, match=r"call model\.eval\(\)"):
            logits(model, case.sequences)
        model.eval()
        check_equal(case, model)


def test_a_pass_that_broke_off_does_not_disturb_the_next(served: Served, engine: str) -> None:
    """An error inside of the model, with a query under way whose answer nobody fetches; before and after learning."""
    case = served.case
    base = copy.deepcopy(case.base)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with served.connected(engine, base=base) as model:
        for _ in range(2):
            for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.act_fn", "mlp.down_proj"):
                # Before connect's own hook in the order of calls, so that the answer is not fetched.
                handle = model.model.layers[1].get_submodule(name).register_forward_hook(stop, prepend=True)
                with pytest.raises(KeyboardInterrupt):
                    logits(model, case.sequences[:, :5])
                handle.remove()
            check_equal(case, model)


def test_a_value_that_is_not_finite_is_reported_and_passes(served: Served, engine: str) -> None:
    case = served.case
    base = copy.deepcopy(case.base)
    with served.connected(engine, base=base) as model:
        check_equal(case, model)
        embedding = model.get_input_embeddings().weight
        kept = embedding[5].clone()
        with torch.no_grad():
            embedding[5] = float("nan")
        with pytest.raises(NonFiniteError):
            logits(model, torch.tensor([[3, 4, 5, 6]]))
        with torch.no_grad():
            embedding[5] = kept
        check_equal(case, model)


# -- the control -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["two percent", "one module missing", "transposed heads"])
def test_the_comparison_notices_a_wrong_adapter(
    served: Served, change: str, tmp_path: Path, record_property: Record
) -> None:
    """An adapter that is served slightly wrong fails the comparison that all tests here rest upon."""
    case = served.case
    for file in case.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"
    if change == "two percent":
        weights = {key: 1.02 * value if "lora_B" in key else value for key, value in weights.items()}
    elif change == "one module missing":
        weights[name] = torch.zeros_like(weights[name])
    else:
        weights[name] = weights[name].flip(0).contiguous()
    safetensors.torch.save_file(weights, tmp_path / "adapter_model.safetensors")
    with server({"a": tmp_path}, "plain") as running, private(case.base, running.address) as model:
        verdict = case.judge(logits(model, case.sequences))
    report(record_property, change, verdict)
    assert verdict.deviation > 3 * verdict.tolerance
    with pytest.raises(AssertionError):
        verdict.check(RANDOM_LIMIT)
