"""What the tests of the audit share: a tiny model and tokenizer, and attackers and defences whose results are known."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from splitveil.attacks.attack import Effort, Progress, Recovery
from splitveil.attacks.catalogue import CONTROLS, create
from splitveil.attacks.control import Ceiling
from splitveil.attacks.knowledge import Access, Knowledge
from splitveil.defences.defence import Defence
from splitveil.errors import ConfigurationError
from splitveil.split import Crossing

CONTEXT = 96
VICTIMS = [
    f"Patient {name} of room {room} takes {room * 7} mg a day" for room, name in enumerate(("Ann", "Bo", "Cy"), 4)
]
SHADOW = [
    f"In the year {year} it rained on {year % 28 + 1} days of the month of May, more than before."
    for year in range(1900, 1940)
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, after a beginning token that it adds by itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0} | {letter: number for number, letter in enumerate(alphabet, 1)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    """Two random blocks of width 32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.125,
        bos_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def lora(folder: Path, size: float, model: Any = None, seed: int = 0) -> Path:
    """A PEFT folder of an adapter of the first block, by default of the tiny model; ``size`` is how large its B is."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=r".*layers\.0\..*(q_proj|v_proj|down_proj)")
    adapted = get_peft_model(model or tiny_model(), config)
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, size)
    adapted.save_pretrained(folder)
    return folder


def save_tiny(folder: Path) -> Path:
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


class Fake:
    """An attack that knows the first block's input by heart: the nearest embedding. Exact at cut 0."""

    name: ClassVar[str] = "fake"
    version = 1
    needs: ClassVar[frozenset[Access]] = frozenset({Access.EMBEDDINGS})
    source = "these tests"
    summary = "the nearest embedding"
    fits = 0

    def fit(self, knowledge: Knowledge, effort: Effort, progress: Progress) -> None:
        type(self).fits += 1
        self._table = knowledge.embeddings
        progress(1.0, "")

    def recover(self, crossing: Crossing, progress: Progress) -> Recovery:
        tokens = torch.cdist(crossing.hidden, self._table[None]).argmin(-1)
        return Recovery(tokens.masked_fill(~crossing.text, -1), {"distance": torch.ones(tokens.shape)})

    def state(self) -> dict[str, Tensor]:
        return {"table": self._table}

    def restore(self, state: Mapping[str, Tensor], knowledge: Knowledge) -> None:
        self._table = state["table"]


class Cheat(Fake):
    """Declares the prompts."""

    name = "cheat"
    needs = frozenset({Access.TRUTH})


class Thief(Fake):
    """Reaches for the prompts without declaring them."""

    name = "thief"

    def fit(self, knowledge: Knowledge, effort: Effort, progress: Progress) -> None:
        self._table = knowledge.truth


class Exhausted(Fake):
    """Runs out of memory."""

    name = "exhausted"

    def recover(self, crossing: Crossing, progress: Progress) -> Recovery:
        raise torch.OutOfMemoryError("out of memory\nlong details")


class Short(Fake):
    """Answers with too few positions."""

    name = "short"

    def recover(self, crossing: Crossing, progress: Progress) -> Recovery:
        return Recovery(torch.zeros(1, 1, dtype=torch.long))


class Defective(Fake):
    """Has a defect."""

    name = "defective"

    def recover(self, crossing: Crossing, progress: Progress) -> Recovery:
        raise KeyError("a defect")


class WrongCeiling(Ceiling):
    """What a broken scoring path would look like."""

    def recover(self, crossing: Crossing, progress: Progress) -> Recovery:
        tokens = super().recover(crossing, progress).tokens.clone()
        tokens[0, 3] = (tokens[0, 3] + 1) % 257
        return Recovery(tokens)


ATTACKS: dict[str, Any] = {one.name: one for one in (Fake, Cheat, Thief, Exhausted, Short, Defective)}
ATTACKS |= {name: partial(create, name) for name in CONTROLS}
UNITS = len(CONTROLS) + 1
"""What is measured at each cut and defence for one attack."""


def create_attack(name: str) -> Any:
    if name not in ATTACKS:
        raise ConfigurationError(f"there is no attack {name!r}")
    return ATTACKS[name]()


class Hiding:
    """Nothing crosses but noise, seeded."""

    name = "hiding"
    summary = "noise alone"

    def __init__(self, seed: int, level: float) -> None:
        self._draw = torch.Generator().manual_seed(seed)
        self.level = level

    @property
    def params(self) -> Mapping[str, float]:
        return {"level": self.level}

    def protect(self, crossing: Crossing) -> Crossing:
        noise = torch.randn(crossing.hidden.shape, generator=self._draw)
        return crossing.with_hidden(crossing.hidden if not self.level else self.level * noise)

    def bytes_a_position(self, width: int) -> float:
        return 4.0 * width


class Failing(Hiding):
    """Cannot protect anything."""

    name = "failing"

    def protect(self, crossing: Crossing) -> Crossing:
        raise ConfigurationError("too wide for this defence")


def create_defence(spec: str, seed: int) -> Defence:
    if spec == "failing":
        return Failing(seed, 1.0)
    return Hiding(seed, {"none": 0.0, "hiding": 1.0}[spec])
