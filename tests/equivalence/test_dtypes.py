"""Whatever the base model's numbers are, ΔWx is added to them in float32: float16, quantised, autocast, a GPU.

bfloat16 is in test_generation.py.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from equivalence.support import (
    RANDOM_LIMIT,
    Served,
    draw_case,
    judge,
    logits,
    random_model,
    random_prompts,
    report,
    served_by_both,
    stated_error,
    tiny_llama,
)
from splitveil.adapters import LoraModule, load_adapter

Record = Callable[[str, object], None]

NEW_TOKENS = 16
MODULE = "model.layers.0.mlp.down_proj"


@contextmanager
def drawn(folder: Path, dtype: torch.dtype) -> Iterator[Served]:
    base = random_model(tiny_llama(), dtype=dtype)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    with served_by_both({"a": draw_case(base, folder, lora, random_prompts(base, 8, 8), NEW_TOKENS)}) as both:
        yield both


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with drawn(tmp_path_factory.mktemp("adapter"), torch.float32) as both:
        yield both


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with drawn(tmp_path_factory.mktemp("adapter"), torch.float16) as both:
        yield both


def change(adapted: LoraModule, x: Tensor) -> Tensor:
    """ΔWx in float64, from the folder's matrices."""
    a, b = (torch.tensor(matrix, dtype=torch.float64) for matrix in (adapted.A, adapted.B))
    return adapted.scale * (x.double() @ a.T @ b.T)


def module_of(folder: Path, name: str) -> LoraModule:
    (adapted,) = (m for m in load_adapter(folder).modules if m.name == name)
    return adapted


# -- float16 -----------------------------------------------------------------------------------------------------------


def test_float16_logits_are_pefts(half: Served, engine: str, record_property: Record) -> None:
    case = half.case
    with half.connected(engine) as model:
        for _ in range(2):
            verdict = case.judge(logits(model, case.sequences))
            report(record_property, "float16", verdict)
            # float16 makes steps of the smallest noise, so that the tolerance is wider: 10 % are exempt.
            verdict.check(limit=0.15)
            assert verdict.different <= RANDOM_LIMIT * verdict.positions


def test_float16_is_rounded_once_as_in_peft(half: Served, record_property: Record) -> None:
    """In the clear: the lattice's noise is nearly as large as what float16 leaves out, and tips as many roundings."""
    case = half.case
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(3)).half()
    peft_module = case.peft.base_model.model.get_submodule(MODULE)
    with torch.no_grad():
        want = peft_module(x)
        low = peft_module.base_layer(x) + change(module_of(case.folder, MODULE), x).half()
        with half.connected("plain") as model:
            got = model.get_submodule(MODULE)(x)
    assert got.dtype == want.dtype == torch.float16
    differ, would_differ = ((y != want).float().mean().item() for y in (got, low))
    report(record_property, "outputs rounded otherwise", f"{differ:.2%}; with ΔWx in float16 {would_differ:.2%}")
    assert differ <= 0.002
    assert would_differ > 0.05


# -- autocast ----------------------------------------------------------------------------------------------------------


def check_autocast(served: Served, engine: str, base: PreTrainedModel) -> str:
    """PEFT's own A and B are multiplied in bfloat16 there; what the private half adds comes from float32 numbers."""
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(3)).to(base.device)
    delta = change(module_of(served.case.folder, MODULE), x.cpu())
    with torch.no_grad(), torch.autocast(base.device.type, torch.bfloat16):
        alone = base.get_submodule(MODULE)(x)
        with served.connected(engine, base=base) as model:
            got = model.get_submodule(MODULE)(x)
    assert got.dtype == alone.dtype == torch.bfloat16
    exact = alone.cpu().double()
    want, low = (exact + delta).bfloat16(), (exact + delta.bfloat16().double()).bfloat16()
    differ, would_differ = ((y != want).float().mean().item() for y in (got.cpu(), low))
    assert differ <= {"plain": 0.001, "lattice": 0.03}[engine]
    assert would_differ > 0.05
    return f"{differ:.2%}; with ΔWx in bfloat16 {would_differ:.2%}"


def test_autocast_rounds_the_sum_and_nothing_before(single: Served, engine: str, record_property: Record) -> None:
    report(record_property, "outputs rounded otherwise", check_autocast(single, engine, single.case.base))


# -- a quantised base --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantised(single: Served) -> PreTrainedModel:
    """The base with int8 weights, and activations that are rounded to eight bits as they come."""
    quantization = pytest.importorskip("torch.ao.quantization", reason="torch has given it up")
    if torch.backends.quantized.engine == "none":
        pytest.skip("this build of torch computes nothing quantised")
    made = quantization.quantize_dynamic(copy.deepcopy(single.case.base), {nn.Linear}).eval()
    assert not isinstance(made.get_submodule(MODULE), nn.Linear)
    return made


def test_a_quantised_base_is_adapted_as_in_the_clear(
    single: Served, quantised: PreTrainedModel, engine: str, record_property: Record
) -> None:
    """PEFT does not adapt such modules, so its arithmetic is done by hand, at every module of two real passes.

    Logits would say little: where the noise tips the rounding of one activation, all that follows differs by a step.
    """
    case = single.case
    passed: list[tuple[LoraModule, Tensor, Tensor]] = []
    with single.connected(engine, base=quantised) as model:
        handles = [
            model.get_submodule(adapted.name).register_forward_hook(
                lambda module, args, output, adapted=adapted: passed.append((adapted, args[0], output))
            )
            for adapted in load_adapter(case.folder).modules
        ]
        for _ in range(2):
            logits(model, case.sequences)
        for handle in handles:
            handle.remove()
    assert len(passed) == 2 * 14
    worst = 0.0
    for adapted, x, output in passed:
        with torch.no_grad():
            base = quantised.get_submodule(adapted.name)(x)
        delta = change(adapted, x)
        error = ((output - base).double() - delta).norm() / delta.norm() / stated_error(x.shape[-1])
        worst = max(worst, error.item())
    report(record_property, "largest error ÷ the stated one", f"{worst:.2f}")
    assert worst <= {"plain": 0.01, "lattice": 3.0}[engine]


# -- a GPU -------------------------------------------------------------------------------------------------------------


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@gpu
def test_logits_on_a_gpu_are_pefts(single: Served, engine: str, record_property: Record) -> None:
    case = single.case
    base, peft = (copy.deepcopy(model).cuda() for model in (case.base, case.peft))
    sequences = case.sequences.cuda()
    want = logits(peft, sequences).cpu()
    with single.connected(engine, base=base) as model:
        for _ in range(2):
            verdict = judge(logits(model, sequences).cpu(), want, case.tolerance)
            report(record_property, "on a GPU", verdict)
            verdict.check(RANDOM_LIMIT)


@gpu
def test_autocast_on_a_gpu_rounds_the_sum_and_nothing_before(single: Served, engine: str) -> None:
    check_autocast(single, engine, copy.deepcopy(single.case.base).cuda())
