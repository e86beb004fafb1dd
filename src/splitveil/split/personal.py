"""What training made of a device half, on the disk: a PEFT folder for adapters, safetensors for whole weights.

Both are read with a whole base model, whose lower blocks they replace or adapt.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from splitveil.errors import AdapterError, BaseModelError
from splitveil.split.folders import whole_folder

LARGEST_ALPHA = 1e9
STEP = "splitveil_step"
"""The file that says how many steps of training made the others."""
CONFIG, ADAPTERS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "device.safetensors"
# Fields of PEFT that would make another adapter of the same tensors, at the values where they do nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "use_bdlora": (False, None),
    "alora_invocation_tokens": (None,),
    "lora_bias": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "layer_replication": ([], None),
    "megatron_config": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": ([], None),
}


def write_adapters(folder: Path, tensors: dict[str, Tensor], *, rank: int, alpha: float, step: int = 0) -> None:
    """Writes an ordinary PEFT folder of LoRA tensors, named as in an adapted model's state dict; whole or not at all.

    ``step`` is how many steps of training made them (``step_of``).

    Raises ``OSError`` as writing does.
    """
    named = {f"base_model.model.{name.replace('.default.', '.')}": t.contiguous() for name, t in tensors.items()}
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=_modules(named), task_type="CAUSAL_LM", inference_mode=True
    )
    with whole_folder(folder) as made:
        config.save_pretrained(str(made))
        (made / ADAPTERS).write_bytes(save(named, {"format": "pt"}))
        (made / STEP).write_text(f"{step}\n", encoding="ascii")


def write_weights(folder: Path, tensors: dict[str, Tensor], *, step: int = 0) -> None:
    """Writes whole weights, named as in the model's state dict; whole or not at all. Raises ``OSError``."""
    named = {name: t.contiguous() for name, t in tensors.items()}
    with whole_folder(folder) as made:
        (made / WEIGHTS).write_bytes(save(named, {"format": "pt"}))
        (made / STEP).write_text(f"{step}\n", encoding="ascii")


def step_of(folder: Path) -> int:
    """How many steps of training made what lies in ``folder``; 0 where it does not say.

    Raises ``AdapterError`` for a file that cannot be read.
    """
    file = folder / STEP
    try:
        step = int(file.read_text(encoding="ascii"))
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise AdapterError(f"{file} cannot be read: {error.strerror or type(error).__name__}") from None
    except ValueError:
        step = -1
    if not 0 <= step < 2**40:
        raise AdapterError(f"{file} is damaged: expected the number of steps that `split train` wrote")
    return step


def personalised(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """A copy of ``model`` with what lies in ``folder`` in place, in ``eval()`` mode, its weights frozen.

    Adapters are added, not merged. Raises ``AdapterError`` for a folder that is missing, damaged or of another kind,
    ``BaseModelError`` for one that does not fit this model.
    """
    place = Path(folder)
    has_adapters, has_weights = (place / CONFIG).is_file(), (place / WEIGHTS).is_file()
    if has_adapters == has_weights:
        found = "both" if has_weights else "neither"
        raise AdapterError(f"{place} holds {found} of {CONFIG} and {WEIGHTS}, expected one: what `split train` wrote")
    twin: PreTrainedModel = copy.deepcopy(model)
    twin = _with_adapters(twin, place) if has_adapters else _with_weights(twin, place)
    return twin.requires_grad_(False).eval()


def _with_weights(twin: PreTrainedModel, place: Path) -> PreTrainedModel:
    tensors = _tensors(place / WEIGHTS)
    _put(dict(twin.named_parameters()), tensors, place)
    return twin


def _with_adapters(twin: PreTrainedModel, place: Path) -> PreTrainedModel:
    rank, alpha, rslora = _settings(place / CONFIG)
    tensors = _tensors(place / ADAPTERS)
    # Before PEFT makes matrices of whatever rank the file says.
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or rank not in tensor.shape:
            raise BaseModelError(
                f"{place} does not fit this model: {name[:200]!r} is {tuple(tensor.shape)}, expected rank {rank}"
            )
    named = dict(twin.named_modules())
    modules = _modules(tensors)
    for name in modules:
        if name not in named:
            raise BaseModelError(f"{place} adapts {name[:200]!r}, which a {type(twin).__name__} does not have")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        use_rslora=rslora,
        target_modules=modules,
        fan_in_fan_out=any(isinstance(named[name], Conv1D) for name in modules),
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng(devices=[]):
            twin = get_peft_model(twin, config).get_base_model()
    except ValueError as error:
        raise BaseModelError(f"{place} does not fit a {type(twin).__name__}: {error}") from None
    places = {
        f"base_model.model.{name.replace('.default.', '.')}": parameter
        for name, parameter in twin.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }
    if places.keys() != tensors.keys():
        odd = min(places.keys() ^ tensors.keys())
        raise AdapterError(f"{place} is incomplete or holds more than plain LoRA: {odd[:200]!r} is on one side only")
    _put(places, tensors, place)
    return twin


def _put(places: dict[str, Any], tensors: dict[str, Tensor], place: Path) -> None:
    for name, tensor in tensors.items():
        if name not in places:
            raise BaseModelError(f"{place} holds {name[:200]!r}, which this model does not have")
        if places[name].shape != tensor.shape:
            raise BaseModelError(
                f"{place} does not fit this model: {name[:200]!r} is {tuple(tensor.shape)}, expected "
                f"{tuple(places[name].shape)}"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            places[name].copy_(tensor)


def _modules(named: dict[str, Tensor]) -> list[str]:
    """Full names of the modules that PEFT's tensors belong to."""
    found = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in named}
    return sorted(found)


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load(file.read_bytes())
    except OSError as error:
        raise AdapterError(f"{file} cannot be read: {error.strerror or type(error).__name__}") from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise AdapterError(f"{file} is damaged: {type(error).__name__}; it was written by `split train`") from None
    if not tensors:
        raise AdapterError(f"{file} holds no tensors")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise AdapterError(f"{file}: {name[:200]!r} holds numbers that are not finite, or not numbers of weights")
    return tensors


def _settings(file: Path) -> tuple[int, float, bool]:
    """(rank, alpha, rsLoRA) of a PEFT configuration."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        rank, alpha = told["r"], told["lora_alpha"]
    except OSError as error:
        raise AdapterError(f"{file} cannot be read: {error.strerror or type(error).__name__}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterError(f"{file} is damaged: {type(error).__name__} where an adapter's settings are read") from None
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not abs(alpha) <= LARGEST_ALPHA:
        raise AdapterError(f"{file}: r is a whole number from 1 and lora_alpha a number, got {rank!r} and {alpha!r}")
    for name, allowed in _NEUTRAL.items():
        if name in told and told[name] not in allowed:
            raise AdapterError(f"{file}: {name} is {told[name]!r}, which a device half does not take; use plain LoRA")
    return rank, float(alpha), bool(told.get("use_rslora"))
