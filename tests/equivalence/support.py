"""What "equal to PEFT" means here, and what the tests need to say it.

An adapter is drawn, plaintext PEFT continues some prompts greedily, and both models then read PEFT's own sequences.
The tolerance is 3 × the largest logit change when Gaussian noise of the protocol's stated relative error is added to
every ΔWx of plaintext PEFT. Deviations stay within it, and the most likely token is the same at every position, except
where the plaintext's two best logits are closer than the tolerance: such positions are exempt, counted and limited.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from splitveil import connect, disconnect
from splitveil.adapters import load_adapter
from splitveil.serving.publishing import ServedAdapter, publish_adapter
from splitveil.serving.server import Server

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
NO_SHARED = "needs the folder `shared` beside the repository, with models and adapters that are not part of it"

# The protocol's relative error by width d (design, section 3), continued at both ends as the √d that it follows.
STATED_ERRORS = {12: 5e-5, 192: 2e-4, 896: 5e-4, 4096: 1e-3, 14336: 2e-3, 57344: 4e-3}
RANDOM_LIMIT, TRAINED_LIMIT = 0.08, 0.01


def stated_error(width: int) -> float:
    """Relative error of a private ΔWx for inputs of ``width`` features."""
    widths, errors = np.log(list(STATED_ERRORS)), np.log(list(STATED_ERRORS.values()))
    return math.exp(np.interp(math.log(width), widths, errors))


# -- models and adapters -----------------------------------------------------------------------------------------------


def random_model(config: PretrainedConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A randomly initialised model that never ends a text by itself."""
    torch.manual_seed(seed)
    return endless(AutoModelForCausalLM.from_config(config, dtype=dtype).eval())


def tiny_llama(**changes: object) -> LlamaConfig:
    """Two blocks, and attention and logits as lively as a trained model's."""
    shape = {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.125,
    }
    return LlamaConfig(**(shape | changes))


def endless(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` with no end-of-text token, so that every greedy sequence has the length that was asked for."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def random_prompts(model: PreTrainedModel, count: int, length: int, seed: int = 1) -> Tensor:
    """(count, length) token ids."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(2, model.config.vocab_size, (count, length), generator=draw)


def greedy(model: nn.Module, prompts: Tensor, new_tokens: int, **more: object) -> Tensor:
    """The prompts (count, length) and their greedy continuations, (count, length + new_tokens)."""
    more.setdefault("attention_mask", torch.ones_like(prompts))
    return model.generate(input_ids=prompts, max_new_tokens=new_tokens, do_sample=False, **more)


def logits(model: nn.Module, sequences: Tensor, **more: object) -> Tensor:
    """Float32 logits at every position of ``sequences``, from one pass over them."""
    with torch.no_grad():
        return model(input_ids=sequences, use_cache=False, **more).logits.float()


@dataclass(frozen=True)
class Case:
    """A base model, plaintext PEFT on a copy of it, the saved adapter, and greedy sequences of the plaintext."""

    base: PreTrainedModel = field(repr=False)
    peft: PeftModel = field(repr=False)
    folder: Path
    prompt_length: int
    sequences: Tensor = field(repr=False)
    """(count, prompt_length + new tokens), plaintext PEFT's own."""
    changed: float
    """Share of the new tokens that the base model would have chosen otherwise, reading the same text."""

    @property
    def prompts(self) -> Tensor:
        return self.sequences[:, : self.prompt_length]

    @property
    def new_tokens(self) -> int:
        return self.sequences.shape[1] - self.prompt_length

    @cached_property
    def plaintext(self) -> Tensor:
        """Plaintext PEFT's logits of its own sequences."""
        return logits(self.peft, self.sequences)

    @cached_property
    def tolerance(self) -> float:
        """What a private logit of these sequences may differ by."""
        return tolerance(self.peft, self.sequences)

    def judge(self, answer: Tensor) -> "Verdict":
        """Compares private logits of the sequences, or of their first tokens, with the plaintext's."""
        return judge(answer, self.plaintext[:, : answer.shape[1]], self.tolerance)


def draw_case(
    base: PreTrainedModel,
    folder: Path,
    lora: LoraConfig,
    prompts: Tensor,
    new_tokens: int,
    *,
    share: float = 0.5,
    prepare: Callable[[PeftModel], None] = lambda peft: None,
) -> Case:
    """An adapter with random A and B, saved to ``folder``.

    B is the smallest tried with which plaintext PEFT chooses at least half of its greedy tokens differently from the
    base's greedy text, and at least ``share`` of them differently from what the base makes of PEFT's own text.
    """
    torch.manual_seed(3)
    peft = get_peft_model(copy.deepcopy(base), lora).eval()
    prepare(peft)
    draw = torch.Generator().manual_seed(2)
    directions = [torch.randn(b.weight.shape, generator=draw) for _, b in lora_pairs(peft)]
    free, first = greedy(base, prompts, new_tokens), prompts.shape[1]
    for exponent in range(30):
        for (_, b), direction in zip(lora_pairs(peft), directions, strict=True):
            b.weight.data.copy_(0.006 * 1.4**exponent * direction)
        # A cheap look at the prompts first; plaintext's own sequences decide.
        if changed_share(base, peft, prompts, 1) < 0.8 * share:
            continue
        sequences = greedy(peft, prompts, new_tokens)
        if changed_share(base, peft, sequences, first) >= share and different(free, sequences, first) >= 0.5:
            break
    peft.save_pretrained(folder, save_embedding_layers=False)
    return made_case(base, peft, folder, prompts, new_tokens)


def made_case(base: PreTrainedModel, peft: PeftModel, folder: Path, prompts: Tensor, new_tokens: int) -> Case:
    """The case of an adapter that exists. Fails where the adapter hardly matters: the test would prove nothing."""
    first = prompts.shape[1]
    sequences = greedy(peft, prompts, new_tokens)
    freely = different(greedy(base, prompts, new_tokens), sequences, first)
    assert freely >= 0.5, f"the adapter changes only {freely:.0%} of the greedy tokens"
    return Case(base, peft, folder, first, sequences, changed_share(base, peft, sequences, first))


def different(one: Tensor, other: Tensor, first: int) -> float:
    """The share of tokens that differ, from position ``first`` on."""
    return (one != other)[:, first:].float().mean().item()


def changed_share(base: nn.Module, peft: nn.Module, sequences: Tensor, first: int) -> float:
    """How often the base's most likely token differs from PEFT's, at the positions from ``first`` on."""
    differ = logits(base, sequences).argmax(-1) != logits(peft, sequences).argmax(-1)
    return differ[:, first - 1 :].float().mean().item()


def lora_pairs(peft: PeftModel) -> list[tuple[nn.Module, nn.Module]]:
    """(A, B) of every adapted module."""
    layers = [m for m in peft.modules() if isinstance(m, LoraLayer)]
    return [(m.lora_A["default"], m.lora_B["default"]) for m in layers]


# -- served privately --------------------------------------------------------------------------------------------------


def published(folder: Path, engine: str) -> ServedAdapter:
    return publish_adapter(load_adapter(folder), engine=engine, allow_insecure=engine == "plain")


def server(folders: Mapping[str, Path], engine: str) -> Server:
    """Serves adapter folders by name, on a free port."""
    return Server({name: published(folder, engine) for name, folder in folders.items()}, "127.0.0.1:0")


@contextmanager
def private(base: PreTrainedModel, address: str, adapter: str = "a") -> Iterator[PreTrainedModel]:
    """``base``, connected for as long as the block lasts."""
    model = connect(base, address, adapter, allow_insecure=True)
    try:
        yield model
    finally:
        disconnect(model)


@dataclass(frozen=True)
class Served:
    """Cases by the names of their adapters, and a server of all of them by engine."""

    cases: dict[str, Case]
    servers: dict[str, Server]

    @property
    def case(self) -> Case:
        """The only one."""
        (case,) = self.cases.values()
        return case

    def connected(
        self, engine: str, *, adapter: str | None = None, base: PreTrainedModel | None = None
    ) -> AbstractContextManager[PreTrainedModel]:
        """The base model of ``adapter``'s case (by default the first), or ``base`` instead, connected."""
        name = adapter or next(iter(self.cases))
        return private(base or self.cases[name].base, self.servers[engine].address, name)


@contextmanager
def served_by_both(cases: Mapping[str, Case]) -> Iterator[Served]:
    """The cases, served by both engines."""
    folders = {name: case.folder for name, case in cases.items()}
    with server(folders, "lattice") as lattice, server(folders, "plain") as plain:
        yield Served(dict(cases), {"lattice": lattice, "plain": plain})


# -- judging -----------------------------------------------------------------------------------------------------------


@contextmanager
def stated_noise(peft: PeftModel, seed: int, factor: float = 1.0) -> Iterator[None]:
    """Adds Gaussian noise of ``factor`` × the stated relative error to every row of every ΔWx of plaintext PEFT."""
    draw = torch.Generator().manual_seed(seed)

    def noisy(size: float) -> Callable[..., Tensor]:
        def add(module: nn.Module, args: object, output: Tensor) -> Tensor:
            scale = size * output.norm(dim=-1, keepdim=True) / math.sqrt(output.shape[-1])
            return output + scale * torch.randn(output.shape, generator=draw)

        return add

    handles = [b.register_forward_hook(noisy(factor * stated_error(a.weight.shape[1]))) for a, b in lora_pairs(peft)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tolerance(peft: PeftModel, sequences: Tensor, draws: int = 4, factor: float = 1.0) -> float:
    """3 × the largest change of any logit of ``sequences`` under ``factor`` × the stated noise, over several draws."""
    clean = logits(peft, sequences)
    largest = 0.0
    for seed in range(draws):
        with stated_noise(peft, seed, factor):
            largest = max(largest, (logits(peft, sequences) - clean).abs().max().item())
    return 3 * largest


@dataclass(frozen=True)
class Verdict:
    """How private logits compare with the plaintext's."""

    deviation: float
    tolerance: float
    exempt: int
    wrong: int
    """Positions that are not exempt and have another most likely token."""
    different: int
    """Positions with another most likely token, exempt or not."""
    positions: int

    def check(self, limit: float) -> None:
        """Fails unless everything is as this module's docstring demands, with at most ``limit`` exempt."""
        assert self.deviation <= self.tolerance, str(self)
        assert self.wrong == 0, str(self)
        assert self.exempt <= limit * self.positions, str(self)

    def __str__(self) -> str:
        return (
            f"deviation {self.deviation:.2e} = {self.deviation / self.tolerance:.1%} of the tolerance "
            f"{self.tolerance:.2e}; exempt {self.exempt} of {self.positions} ({self.exempt / self.positions:.2%}), "
            f"other tokens there {self.different - self.wrong}, elsewhere {self.wrong}"
        )


def gaps(plaintext: Tensor) -> Tensor:
    """The distance of the two best logits at every position."""
    best = plaintext.topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


def judge(answer: Tensor, plaintext: Tensor, allowed: float) -> Verdict:
    """Compares logits (…, vocabulary) position by position."""
    exempt = gaps(plaintext) < allowed
    other = answer.argmax(-1) != plaintext.argmax(-1)
    deviation = (answer - plaintext).abs().max().item()
    return Verdict(
        deviation, allowed, int(exempt.sum()), int((other & ~exempt).sum()), int(other.sum()), exempt.numel()
    )


def same_greedy(case: Case, got: Tensor) -> str:
    """How many greedy sequences are the plaintext's, and for every other one the gap where it first differs.

    Fails where such a gap is not below the tolerance.
    """
    exceptions = []
    for row, (ours, theirs) in enumerate(zip(got, case.sequences, strict=True)):
        if torch.equal(ours, theirs):
            continue
        first = int((ours != theirs).nonzero()[0])
        gap = gaps(case.plaintext[row, first - 1]).item()
        exceptions.append(
            f"; prompt {row} differs from new token {first - case.prompt_length} on, where the gap is {gap:.2e} and "
            f"the tolerance {case.tolerance:.2e}"
        )
        assert gap < case.tolerance, exceptions[-1]
    return f"{len(got) - len(exceptions)} of {len(got)} × {case.new_tokens} tokens{''.join(exceptions)}"


def is_stable(peft: PeftModel, run: Callable[[nn.Module], Tensor]) -> bool:
    """Whether ``run`` gives the same tokens under ten times the stated noise, in eight draws.

    Where a plaintext run sits on the edge between two tokens, "the same tokens" is not a fair demand. Greedy runs have
    their gaps for that; sampling and beams have this.
    """
    clean = run(peft)
    for seed in range(8):
        with stated_noise(peft, seed, factor=10.0):
            noisy = run(peft)
        if noisy.shape != clean.shape or not torch.equal(noisy, clean):
            return False
    return True


def report(record_property: Callable[[str, object], None], name: str, value: object) -> None:
    """Prints a figure (``pytest -s``) and keeps it in the test report."""
    record_property(name, str(value))
    print(f"\n  {name}: {value}", end="")
