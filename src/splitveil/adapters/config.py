"""Reads `adapter_config.json` by an allow-list.

A field is either understood, or it must have the value at which PEFT does nothing. A field that this version does not
know is refused unless it is null: what it would change is unknown, and an adapter that is served slightly wrong is
worse than one that is not served.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

from splitveil.adapters.fields import Fields, shown
from splitveil.adapters.matching import LayerRule, NameRule, PatternTable, TargetRule, layer_patterns
from splitveil.adapters.neutral import NEUTRAL, refuse_base_changing_init
from splitveil.errors import AdapterError, UnsupportedAdapterError

SUPPORTED = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "peft_type",
        "peft_version",
        "r",
        "rank_pattern",
        "revision",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)

# Random or data-driven starting points: they choose the first A and B, and the trained A and B are in the folder.
_HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class LoraSettings:
    """What a configuration says about the adapter's matrices.

    `base_model` is what the training run was given: a hint, possibly a path on the vendor's disk, and not for
    publication.
    """

    base_model: str | None
    targets: TargetRule
    _rank: int
    _alpha: float
    _use_rslora: bool
    _ranks: PatternTable[int]
    _alphas: PatternTable[float]

    def rank(self, module: str) -> int:
        """The rank of the matrices of `module`."""
        return self._ranks.get(module, self._rank)

    def scale(self, module: str) -> float:
        """The factor of B·A: alpha/r, or alpha/√r for rsLoRA (arXiv 2312.03732)."""
        rank = self.rank(module)
        return self._alphas.get(module, self._alpha) / (math.sqrt(rank) if self._use_rslora else rank)


def parse_config(data: bytes, where: str) -> LoraSettings:
    """Read the bytes of an `adapter_config.json`; `where` names the file in messages.

    Raises:
        UnsupportedAdapterError: a field asks for something that is not plain LoRA.
        AdapterError: the file is not JSON, or a field has a value that PEFT would not accept either.
    """
    fields = Fields(_json_object(data, where), where)
    _check_kind(fields)
    for name, value in fields.config.items():
        _check_allowed(fields, name, value)
    _check_init(fields)
    _check_ignored(fields)
    _check_alpha(fields)
    return LoraSettings(
        base_model=fields.label("base_model_name_or_path"),
        targets=_targets(fields),
        # 8 and 8 are PEFT's defaults.
        _rank=fields.rank("r", 8),
        _alpha=fields.number("lora_alpha", 8),
        _use_rslora=fields.flag("use_rslora"),
        _ranks=PatternTable(fields.ranks("rank_pattern"), where, "rank_pattern"),
        _alphas=PatternTable(fields.numbers("alpha_pattern"), where, "alpha_pattern"),
    )


def _json_object(data: bytes, where: str) -> dict[str, Any]:
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{where}: not JSON ({error}); save the adapter again with PEFT") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{where}: got a JSON {type(config).__name__}, expected an object; save the adapter again")
    return config


def _check_kind(fields: Fields) -> None:
    # Checked before all else: the fields of another method would only be reported as unknown.
    kind = fields.config.get("peft_type")
    if kind != "LORA":
        raise fields.unsupported("peft_type", kind, '"LORA"', "train a LoRA adapter")
    task = fields.config.get("task_type")
    if task not in ("CAUSAL_LM", None):
        advice = "only adapters of causal language models can be served"
        raise fields.unsupported("task_type", task, '"CAUSAL_LM" or null', advice)


def _check_allowed(fields: Fields, name: str, value: object) -> None:
    if name in SUPPORTED:
        return
    if name in NEUTRAL:
        neutral, advice = NEUTRAL[name]
        # In Python 0 == False, and PEFT does not promise the same.
        if not any(type(value) is type(allowed) and value == allowed for allowed in neutral):
            raise fields.unsupported(name, value, shown(neutral[0]), advice)
    elif value is not None:
        raise UnsupportedAdapterError(
            f"{fields.where}: field {name[:80]!r} is not known, and what it changes cannot be checked; set it to null "
            "if the adapter is plain LoRA without it, or use a newer Splitveil"
        )


def _check_init(fields: Fields) -> None:
    init = fields.config.get("init_lora_weights", True)
    if isinstance(init, str):
        refuse_base_changing_init(init, fields.where)
    if not isinstance(init, bool) and init not in _HARMLESS_INITS:
        expected = f"true, false or one of {', '.join(_HARMLESS_INITS)}"
        raise fields.unsupported("init_lora_weights", init, expected, "convert to plain LoRA first")
    # PEFT writes an EVA configuration whenever training starts from EVA. It is read by the start alone.
    eva = fields.config.get("eva_config")
    if eva is not None and (init != "eva" or not isinstance(eva, dict)):
        advice = 'it belongs to init_lora_weights = "eva"; set it to null'
        raise fields.unsupported("eva_config", eva, "null", advice)


def _check_ignored(fields: Fields) -> None:
    """Check the fields that inference does not depend on, so that a misread file is not taken for a good one."""
    # A and B have the same shapes for Linear and for the transposed Conv1D, which is what fan_in_fan_out is about.
    fields.flag("fan_in_fan_out")
    fields.flag("inference_mode")
    fields.label("peft_version")
    fields.label("revision")
    dropout = fields.number("lora_dropout", 0.0)
    if not 0.0 <= dropout <= 1.0:
        raise fields.wrong("lora_dropout", dropout, "a probability")
    # Written by PEFT when task_type is null; it names the Python class of the base model and changes no number.
    mapping = fields.config.get("auto_mapping")
    if mapping is not None and not (
        isinstance(mapping, dict)
        and mapping.keys() <= {"base_model_class", "parent_library"}
        and all(isinstance(value, str) for value in mapping.values())
    ):
        raise fields.wrong("auto_mapping", mapping, "null or the strings base_model_class and parent_library")


def _check_alpha(fields: Fields) -> None:
    """With an alpha of 0 PEFT adds nothing anywhere: not what anybody trained. A negative one takes away, as asked."""
    if fields.number("lora_alpha", 8) == 0 and not fields.numbers("alpha_pattern"):
        raise fields.wrong("lora_alpha", 0, "a number other than 0, with which the adapter does nothing")


def _targets(fields: Fields) -> TargetRule:
    targets = fields.config.get("target_modules")
    if targets is None:
        raise AdapterError(
            f"{fields.where}: target_modules = null lets PEFT choose by the base model, which a server does not know; "
            "write the module names into the file"
        )
    layers, patterns = fields.config.get("layers_to_transform"), fields.config.get("layers_pattern")
    if isinstance(targets, str) and (layers is not None or patterns is not None):
        raise AdapterError(
            f"{fields.where}: layers_to_transform and layers_pattern need a list of target_modules, got a string; "
            "set them to null, or list the modules"
        )
    if patterns and layers is None:
        raise AdapterError(f"{fields.where}: layers_pattern needs layers_to_transform; set both or neither")
    everything = isinstance(targets, str) and targets.lower() == "all-linear"
    return TargetRule(
        targets=None if everything else fields.names("target_modules"),
        excludes=fields.names("exclude_modules") if fields.config.get("exclude_modules") else NameRule(),
        layers=_layers(fields),
    )


def _layers(fields: Fields) -> LayerRule | None:
    if fields.config.get("layers_to_transform") is None:
        return None
    indices = fields.integers("layers_to_transform")
    if not indices:
        # PEFT takes an empty list for no restriction.
        return None
    if not fields.config.get("layers_pattern"):
        return LayerRule(frozenset(indices))
    return LayerRule(frozenset(indices), layer_patterns(fields.strings("layers_pattern"), fields.where))
