"""A session's own copy of a model: adapters in place, cut, and what its side may train."""

import copy
import hashlib
import json
import threading
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from splitveil.errors import BaseModelError, ConfigurationError
from splitveil.split import Crossing, Three, cut_in_three
from splitveil.split.blocks import find_blocks
from splitveil.splitlearning.interface import Plan, Shape, Trains

SAMPLED = 256
"""Numbers of each tensor that go into a fingerprint."""
_NOT_COMPUTED = frozenset(
    {"architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "torch_dtype", "transformers_version"}
    | {"use_cache"}
)
"""Of a configuration: where it comes from, and what decides nothing about hidden states. The dtype is the weights'."""
_drawing = threading.Lock()


class Side(StrEnum):
    """Who is asking."""

    DEVICE = "device"
    CLOUD = "cloud"


@dataclass(frozen=True, repr=False)
class Parts:
    """A model cut in three, and the parameters that one side trains, by their names in the model's state dict."""

    three: Three
    trained: dict[str, nn.Parameter]


def prepare(base: PreTrainedModel, cut: int, plan: Plan | None, side: Side) -> Parts:
    """The parts of a copy of ``base`` for one session. What is not trained shares memory with ``base``.

    ``base`` is only read, and several threads may do so at once. The copy is in ``eval()`` mode: there is no dropout.
    Adapters are PEFT's, drawn for the whole model after ``torch.manual_seed(plan.seed)``.

    Raises ``ConfigurationError`` for a plan that this model cannot follow, ``BaseModelError`` for a model whose blocks
    cannot be found, or whose adapters or full training have no place.
    """
    model = shared_copy(base)
    _, blocks = find_blocks(model)
    if not 0 <= cut <= len(blocks):
        raise ConfigurationError(
            f"cut {cut} does not exist: this model has {len(blocks)} blocks, so 0 to {len(blocks)}"
        )
    if plan is None:
        return Parts(cut_in_three(model, cut), {})
    if plan.cut != cut:
        raise ConfigurationError(f"the plan cuts after {plan.cut} blocks and the session after {cut}")
    trains = plan.device if side is Side.DEVICE else plan.cloud
    if Trains.FULL in (plan.device, plan.cloud):
        _check_full(model, plan)
    if trains is Trains.LORA:
        model = with_adapters(model, plan)
    three = cut_in_three(model, cut)
    found = _of_lora(model, cut, side) if trains is Trains.LORA else {}
    if trains is Trains.FULL:
        found = _of_side(model, three, plan, side)
        for parameter in found.values():
            parameter.data = parameter.data.clone()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in found.values():
        parameter.requires_grad_(True)
    return Parts(three, found)


def shared_copy(base: PreTrainedModel) -> PreTrainedModel:
    """A copy with modules and parameters of its own, whose numbers lie in the memory of ``base``'s."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in base.parameters()}
    return copy.deepcopy(base, memo).eval()


def with_adapters(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """``model`` itself, with fresh LoRA adapters in its blocks; B is zero, A is drawn from ``plan.seed``.

    Raises ``ConfigurationError`` for targets that are not there, cannot carry an adapter, or are outside the blocks.
    """
    named = [m for name, m in model.named_modules() if name.rpartition(".")[2] in plan.targets]
    config = LoraConfig(
        r=plan.rank,
        lora_alpha=plan.alpha,
        lora_dropout=0.0,
        target_modules=list(plan.targets),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in named),
        task_type="CAUSAL_LM",
    )
    try:
        # The generator is one for the whole process: of two threads, each has to draw its own adapters undisturbed.
        with _drawing, torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.seed)
            adapted: PreTrainedModel = get_peft_model(model, config).get_base_model()
    except ValueError as error:
        # PEFT prints the module, which may be the whole model, over many lines.
        reason = str(error).partition("\n")[0][:200]
        raise ConfigurationError(f"no adapters for {', '.join(plan.targets)}: {reason}") from None
    place, _ = find_blocks(adapted)
    outside = {name for name, _ in adapted.named_parameters() if "lora_" in name and not name.startswith(f"{place}.")}
    if outside:
        raise ConfigurationError(
            f"adapters go into the blocks only, and {', '.join(plan.targets)} name modules outside them, as "
            f"{min(outside)}; leave those out"
        )
    return adapted.eval()


def fingerprint(model: PreTrainedModel) -> str:
    """64 hex digits that tell whether two sides have the same base model.

    SHA-256 over names, shapes and dtypes of all parameters and over at most ``SAMPLED`` numbers of each, evenly spread,
    and over what the configuration says beside its defaults: it finds another model, another training run, another
    dtype, or another way to compute; it does not find a single changed weight.
    """
    digest = hashlib.sha256()
    told = model.config.get_text_config(decoder=True).to_diff_dict()
    computed = {name: value for name, value in told.items() if name not in _NOT_COMPUTED and name[:1] != "_"}
    digest.update(json.dumps(computed, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        digest.update(json.dumps([name, list(parameter.shape), str(parameter.dtype)]).encode())
        flat = parameter.detach().flatten()
        places = torch.linspace(0, max(len(flat) - 1, 0), min(SAMPLED, len(flat)), dtype=torch.float64).long()
        digest.update(flat[places.to(flat.device)].cpu().double().numpy().tobytes())
    return digest.hexdigest()


def context_of(model: PreTrainedModel) -> int | None:
    """Positions of one text that the model can have; None where its configuration does not say."""
    found = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def width_of(model: PreTrainedModel) -> int:
    """Width of the hidden states. Raises ``BaseModelError`` where the configuration does not say."""
    found = getattr(model.config.get_text_config(decoder=True), "hidden_size", None)
    if not isinstance(found, int):
        raise BaseModelError(f"the configuration of a {type(model).__name__} names no hidden_size")
    return found


def vocabulary_of(model: PreTrainedModel) -> int:
    """Rows of the embedding matrix."""
    return int(model.get_input_embeddings().num_embeddings)


def _block_of(name: str, place: str) -> int | None:
    """The block that a parameter is in, or None for one outside the blocks."""
    if not name.startswith(f"{place}."):
        return None
    return int(name.removeprefix(f"{place}.").partition(".")[0])


def _has(side: Side, block: int, cut: int) -> bool:
    return block < cut if side is Side.DEVICE else block >= cut


def _of_lora(model: PreTrainedModel, cut: int, side: Side) -> dict[str, nn.Parameter]:
    place, _ = find_blocks(model)
    found = {}
    for name, parameter in model.named_parameters():
        block = _block_of(name, place)
        if "lora_" in name and block is not None and _has(side, block, cut):
            found[name] = parameter
    return found


def _of_side(model: PreTrainedModel, three: Three, plan: Plan, side: Side) -> dict[str, nn.Parameter]:
    """Parameters of one side in full training. Those outside the blocks belong to the part that uses them."""
    place, _ = find_blocks(model)
    named = dict(model.named_parameters())
    rest = {name: p for name, p in named.items() if _block_of(name, place) is None}
    entry, middle, exit_ = _users(three, rest)
    if middle:
        raise BaseModelError(
            f"{min(middle)} is outside the blocks and used inside them: full training of a {type(model).__name__} "
            "cannot be split; train adapters"
        )
    frozen = _embedding_names(model) if plan.freeze_embeddings else set()
    if plan.shape is Shape.STRAIGHT and (entry & exit_) - frozen:
        raise ConfigurationError(
            f"{min((entry & exit_) - frozen)} is used on both sides, as embeddings and in the head; in the straight "
            "shape two copies of it would be trained apart. Freeze the embeddings, use the U shape, or train adapters"
        )
    if plan.shape is Shape.U:
        own = entry | exit_ if side is Side.DEVICE else set()
    else:
        own = entry if side is Side.DEVICE else exit_
    found = {}
    for name, parameter in named.items():
        block = _block_of(name, place)
        mine = name in own - frozen if block is None else _has(side, block, plan.cut)
        if mine:
            found[name] = parameter
    return found


def _check_full(model: PreTrainedModel, plan: Plan) -> None:
    """Also where the other side is the one that trains everything: both sides refuse the same plans."""
    if model.dtype == torch.float16:
        raise ConfigurationError("full training in float16 loses small steps; load the model in float32 or bfloat16")
    for side, trains in ((Side.DEVICE, plan.device), (Side.CLOUD, plan.cloud)):
        if trains is Trains.FULL:
            _of_side(model, cut_in_three(model, plan.cut), plan, side)


def _embedding_names(model: PreTrainedModel) -> set[str]:
    matrix = model.get_input_embeddings().weight
    return {name for name, parameter in model.named_parameters() if parameter is matrix}


def _users(three: Three, rest: dict[str, nn.Parameter]) -> tuple[set[str], set[str], set[str]]:
    """Which of ``rest`` the device half, the middle and the tail use: those that get a gradient from their output."""
    names, parameters = list(rest), list(rest.values())

    def used(output: Tensor) -> set[str]:
        if not output.requires_grad:
            return set()
        gradients = torch.autograd.grad(output.float().square().sum(), parameters, allow_unused=True)
        return {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}

    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            token = torch.zeros(1, 2, dtype=torch.long, device=three.device.model.device)
            crossing = three.device(token)
            entry = used(crossing.hidden)
            arrived = Crossing(crossing.hidden.detach(), crossing.mask)
            middle = used(three.middle(arrived))
            return entry, middle, used(three.tail(arrived))
    finally:
        for parameter, needed in zip(parameters, before, strict=True):
            parameter.requires_grad_(needed)
