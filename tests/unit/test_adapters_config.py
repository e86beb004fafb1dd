"""adapter_config.json: every field of PEFT is understood or refused by name, and names match as they do in PEFT."""

import dataclasses
import json

import pytest
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from splitveil.adapters.config import SUPPORTED, LoraSettings, parse_config
from splitveil.adapters.neutral import NEUTRAL
from splitveil.errors import AdapterError, UnsupportedAdapterError

FILE = "some-folder/adapter_config.json"

MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.10.self_attn.v_proj",
    "model.layers.1.mlp.experts.2.down_proj",
    "transformer.h.1.attn.c_attn",
    "transformer.h.2.mlp.c_proj",
    "layers.1.q_proj",
    "q_proj",
    "my_q_proj",
]


def saved(**changes) -> dict:
    """What PEFT writes for a plain LoRA adapter, with some fields changed."""
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], inference_mode=True).to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    return {**config, "peft_type": "LORA", **changes}


def parse(config: object) -> LoraSettings:
    return parse_config(json.dumps(config).encode(), FILE)


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(FILE)
    return message


def test_what_peft_writes_by_default_is_accepted():
    settings = parse(saved())
    assert settings.rank("q_proj") == 8
    assert settings.scale("q_proj") == 1.0
    assert settings.base_model is None


def test_absent_fields_take_the_defaults_of_peft():
    settings = parse({"peft_type": "LORA", "target_modules": ["q_proj"]})
    assert (settings.rank("q_proj"), settings.scale("q_proj")) == (LoraConfig().r, LoraConfig().lora_alpha / 8)


# ---------------------------------------------------------------- the allow-list


def changed(field: dataclasses.Field) -> list[object]:
    """JSON values of a field that differ from its default, of its own type and of others."""
    plain = [True, False, 0, 1, 17, 0.5, "something", ["something"], [0], {"some": "thing"}, {}, []]
    default = saved().get(field.name, field.default)
    return [value for value in plain if type(value) is not type(default) or value != default]


FIELDS = dataclasses.fields(LoraConfig)


@pytest.mark.parametrize("field", [f for f in FIELDS if f.name not in SUPPORTED], ids=lambda field: field.name)
def test_every_field_of_peft_that_is_not_supported_is_refused_by_name_when_changed(field):
    refused = 0
    for value in changed(field):
        if any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL.get(field.name, ((), ""))[0]):
            continue
        with pytest.raises(UnsupportedAdapterError) as error:
            parse(saved(**{field.name: value}))
        assert field.name in one_line(error)
        refused += 1
    assert refused >= 9


@pytest.mark.parametrize("field", [f for f in FIELDS if f.name in SUPPORTED], ids=lambda field: field.name)
def test_every_supported_field_is_checked(field):
    """Whatever stands in it, it is accepted or refused by its name; and something is refused in each."""
    refusals = []
    for value in changed(field):
        try:
            parse(saved(**{field.name: value}))
        except AdapterError as error:
            refusals.append(str(error))
    assert len(refusals) >= 4
    assert all(field.name in refusal for refusal in refusals)


def test_no_field_is_both_supported_and_unused():
    assert not SUPPORTED & NEUTRAL.keys()


def test_only_fields_that_peft_has_or_had_are_listed():
    fields = {field.name for field in FIELDS}
    assert fields >= SUPPORTED
    assert NEUTRAL.keys() - fields == {"enable_lora", "merge_weights"}


@pytest.mark.parametrize("name", [name for name in NEUTRAL if name in {f.name for f in FIELDS}])
def test_the_first_neutral_value_is_the_default_of_peft(name):
    default = "absent" if name == "runtime_config" else saved()[name]
    assert default == "absent" or NEUTRAL[name][0][0] == default


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_neutral_values_are_accepted(name):
    for value in NEUTRAL[name][0]:
        parse(saved(**{name: value}))


@pytest.mark.parametrize("name", ["use_dora", "lora_bias", "use_qalora"])
def test_a_number_is_not_taken_for_a_flag(name):
    with pytest.raises(UnsupportedAdapterError, match=name):
        parse(saved(**{name: 0}))


@pytest.mark.parametrize("value", [False, 0, "", [], {}, 1, "on"])
def test_an_unknown_field_is_refused_whatever_its_value(value):
    with pytest.raises(UnsupportedAdapterError, match="use_tomorrow") as error:
        parse(saved(use_tomorrow=value))
    assert "set it to null" in one_line(error)


def test_an_unknown_field_that_is_null_is_accepted():
    parse(saved(use_tomorrow=None))


@pytest.mark.parametrize("kind", ["ADALORA", "LOHA", "IA3", "PREFIX_TUNING", "lora", None, 3])
def test_other_methods_are_refused(kind):
    with pytest.raises(UnsupportedAdapterError, match="peft_type"):
        parse(saved(peft_type=kind))


def test_another_method_is_named_before_its_fields_are():
    with pytest.raises(UnsupportedAdapterError, match="peft_type"):
        parse({"target_r": 8, "peft_type": "ADALORA"})


@pytest.mark.parametrize("task", ["SEQ_CLS", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", 1])
def test_other_tasks_are_refused(task):
    with pytest.raises(UnsupportedAdapterError, match="task_type"):
        parse(saved(task_type=task))


# ---------------------------------------------------------------- how training started


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "mica"])
def test_a_start_that_leaves_the_base_model_alone_is_accepted(init):
    parse(saved(init_lora_weights=init))


def test_eva_is_accepted_with_the_configuration_that_peft_writes_beside_it():
    eva = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights="eva").to_dict()["eva_config"]
    assert eva is not None
    parse(saved(init_lora_weights="eva", eva_config=eva))
    with pytest.raises(UnsupportedAdapterError, match="eva_config"):
        parse(saved(eva_config=eva))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "PiSSA", "olora", "OLoRA", "corda", "lora_ga", "loftq"])
def test_a_start_that_changes_the_base_model_is_refused(init):
    with pytest.raises(UnsupportedAdapterError, match="convert to plain LoRA first") as error:
        parse(saved(init_lora_weights=init))
    assert init in one_line(error)


def test_every_start_that_peft_dispatches_on_has_been_considered():
    starts = {name.removesuffix("_init") for name in vars(LoraLayer) if name.endswith("_init")}
    assert starts <= {"pissa", "olora", "corda", "loftq", "lora_ga", "orthogonal", "mica"}


@pytest.mark.parametrize("init", ["tomorrow", "", None, 1, ["eva"]])
def test_an_unknown_start_is_refused(init):
    with pytest.raises(UnsupportedAdapterError, match="init_lora_weights"):
        parse(saved(init_lora_weights=init))


# ---------------------------------------------------------------- malformed files


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b'{"r": 8', b"\xff\xfe\x00", b"[" * 100_000, b'{"r": ' + b"9" * 5000 + b"}"],
    ids=["empty", "open", "cut", "not text", "deep", "long number"],
)
def test_what_is_not_json_is_refused(data):
    with pytest.raises(AdapterError, match="not JSON"):
        parse_config(data, FILE)


@pytest.mark.parametrize("config", [[], "LORA", 8, None])
def test_json_that_is_not_an_object_is_refused(config):
    with pytest.raises(AdapterError, match="expected an object"):
        parse(config)


MALFORMED = [
    ("r", 0),
    ("r", -1),
    ("r", 8.0),
    ("r", True),
    ("r", None),
    ("r", "8"),
    ("lora_alpha", "16"),
    ("lora_alpha", None),
    ("lora_alpha", True),
    ("lora_alpha", float("nan")),
    ("lora_alpha", float("inf")),
    ("lora_alpha", 10**400),
    ("lora_alpha", 0),
    ("use_rslora", 1),
    ("use_rslora", None),
    ("fan_in_fan_out", "true"),
    ("inference_mode", "yes"),
    ("lora_dropout", 1.5),
    ("lora_dropout", None),
    ("rank_pattern", []),
    ("rank_pattern", {"q_proj": 0}),
    ("rank_pattern", {"q_proj": "8"}),
    ("rank_pattern", {"q_proj(": 8}),
    ("alpha_pattern", {"q_proj": None}),
    ("alpha_pattern", {"*": 8}),
    ("alpha_pattern", 3),
    ("target_modules", None),
    ("target_modules", 3),
    ("target_modules", ["q_proj", 3]),
    ("target_modules", "q_proj("),
    ("target_modules", "a{99999999999999999999}"),
    ("exclude_modules", 3),
    ("exclude_modules", "["),
    ("layers_to_transform", "0"),
    ("layers_to_transform", [True]),
    ("layers_to_transform", [0.0]),
    ("layers_to_transform", -1),
    ("layers_to_transform", [0, -1]),
    ("layers_pattern", "layers"),
    ("base_model_name_or_path", 3),
    ("base_model_name_or_path", "gpt2\x1b[2J"),
    ("base_model_name_or_path", "gpt2\nfoo"),
    ("revision", ["main"]),
    ("peft_version", 1),
    ("auto_mapping", {"base_model_class": 3}),
    ("auto_mapping", {"code": "run.py"}),
    ("auto_mapping", "LlamaForCausalLM"),
]


@pytest.mark.parametrize(("name", "value"), MALFORMED)
def test_a_malformed_field_is_refused_by_name(name, value):
    with pytest.raises(AdapterError, match=name) as error:
        parse(saved(**{name: value}))
    assert not isinstance(error.value, UnsupportedAdapterError)
    one_line(error)


def test_an_alpha_that_takes_away_is_served_as_asked():
    assert parse(saved(lora_alpha=-16)).scale("q_proj") == -2.0
    assert parse(saved(lora_alpha=0, alpha_pattern={"q_proj": 4})).scale("q_proj") == 0.5


@pytest.mark.parametrize("fields", [{"layers_to_transform": [0]}, {"layers_to_transform": 0, "layers_pattern": "h"}])
def test_layers_with_a_pattern_of_targets_are_refused_as_in_peft(fields):
    config = saved(target_modules=".*q_proj", **fields)
    with pytest.raises(ValueError, match="layers_to_transform"):
        LoraConfig(**{name: value for name, value in config.items() if name != "peft_type"})
    with pytest.raises(AdapterError, match="layers_to_transform"):
        parse(config)


@pytest.mark.parametrize("fields", [{"r": 1025}, {"rank_pattern": {"q_proj": 4096}}])
def test_an_excessive_rank_is_refused(fields):
    with pytest.raises(UnsupportedAdapterError, match="at most 1024"):
        parse(saved(**fields))


def test_auto_mapping_as_peft_writes_it_is_accepted():
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}
    parse(saved(task_type=None, auto_mapping=mapping))


def test_long_values_are_cut_in_messages():
    with pytest.raises(AdapterError) as error:
        parse(saved(modules_to_save=["x" * 10_000]))
    assert len(str(error.value)) < 400


# ---------------------------------------------------------------- names, compared with PEFT's own functions

TARGETS = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "c_attn", "down_proj"]},
    {"target_modules": ["self_attn.q_proj", "model.layers.10.self_attn.v_proj"]},
    {"target_modules": []},
    {"target_modules": [""]},
    {"target_modules": "q_proj"},
    {"target_modules": r".*\.(q|v)_proj"},
    {"target_modules": r"model\.layers\.1\..*"},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.1\..*"},
    {"target_modules": ["q_proj"], "exclude_modules": []},
    {"target_modules": ["q_proj", "c_attn", "down_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "c_attn", "down_proj"], "layers_to_transform": [1, 2]},
    {"target_modules": ["q_proj", "layers.1.q_proj"], "layers_to_transform": [0]},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "c_attn", "down_proj"], "layers_to_transform": [2], "layers_pattern": ["experts"]},
    {"target_modules": ["down_proj"], "layers_to_transform": [2], "layers_pattern": ["layers", "experts"]},
    {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [1], "layers_pattern": []},
    {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [1], "layers_pattern": ""},
]


@pytest.mark.parametrize("fields", TARGETS, ids=json.dumps)
def test_targets_are_those_of_peft(fields):
    rule, config = parse(saved(**fields)).targets, LoraConfig(**fields)
    expected = {name: bool(check_target_module_exists(config, name)) for name in MODULES}
    assert {name: rule.matches(name) for name in MODULES} == expected


@pytest.mark.parametrize("name", ["all-linear", "All-Linear"])
def test_all_linear_matches_every_linear_module(name):
    rule = parse(saved(target_modules=name, exclude_modules=["v_proj"])).targets
    assert [module for module in MODULES if not rule.matches(module)] == ["model.layers.10.self_attn.v_proj"]


PATTERNS = [
    {"q_proj": 4},
    {"proj": 4},
    {r"layers\.1\..*": 4, "q_proj": 2},
    {"q_proj": 2, r"layers\.1\..*": 4},
    {"^model.layers.0.self_attn.q_proj": 4},
    {r"^q_proj": 4},
    {"q_proj|v_proj": 4},
    {"layers.1.self_attn.q_proj": 16, "h.1.attn.c_attn": 32},
    {r"model\.layers\.1\.self_attn\.q_proj$": 5},
    {"": 3},
]


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=json.dumps)
def test_ranks_and_alphas_follow_the_patterns_as_in_peft(pattern, use_rslora):
    alphas = {key: 3.5 * value for key, value in reversed(pattern.items())}
    settings = parse(saved(r=8, lora_alpha=12, rank_pattern=pattern, alpha_pattern=alphas, use_rslora=use_rslora))
    for name in MODULES:
        rank = pattern.get(get_pattern_key(pattern.keys(), name), 8)
        alpha = alphas.get(get_pattern_key(alphas.keys(), name), 12)
        assert settings.rank(name) == rank
        assert settings.scale(name) == alpha / (rank**0.5 if use_rslora else rank)


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_a_broken_pattern_is_shown_as_it_stands_in_the_file(name):
    with pytest.raises(AdapterError, match=r"holds 'q_proj\('"):
        parse(saved(**{name: {"q_proj(": 8}}))


def test_null_patterns_are_empty():
    assert parse(saved(rank_pattern=None, alpha_pattern=None)).scale("q_proj") == 1.0
