"""A as PEFT drew it before training: drawn again under a seed, or read from a folder, and told from wrong guesses.

PEFT draws A at random, starts B at 0 and trains both. What training adds to A does not take away what was there: the
rows of the core keep a share of their length in the initial row space, well above the r/d of chance, and any answers
show it. The same answers do for all guesses, since a guess is only compared with them.
"""

import copy
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from torch import nn

from splitveil.adapters import load_adapter
from splitveil.errors import ConfigurationError
from splitveil.extraction.client import Client, residues
from splitveil.extraction.known import row_space
from splitveil.private.bound import HALF
from splitveil.private.columns import MARGIN

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Guess = tuple[str, Mapping[str, F32]]
"""What it is called, and A of every module: (r, d)."""
CHECKING_ROWS = 16
"""Beyond the rank: equations that are left to check a guess with, at every layer."""
FALSE_ALARM = 1e-3
"""How likely one of the guesses counts as recognised if none is right."""
SEEDS = "0-99"
"""What an attacker tries, if nothing else is said."""
_DRAWN = (True, "gaussian")  # initialisations that depend on the seed and on no data


@dataclass(frozen=True)
class Guesses:
    """What an attacker takes for the initial A: ``text`` is a PEFT folder, or seeds such as ``0-99,1234``.

    ``folder`` holds the adapter under attack. Of that only the configuration is read: ranks and modules are public.
    Raises ``ConfigurationError`` for a ``text`` that is neither.
    """

    model: nn.Module = field(repr=False)
    folder: Path
    text: str

    def __post_init__(self) -> None:
        if not Path(self.text).is_dir():
            self._seeds()

    def __iter__(self) -> Iterator[Guess]:
        if Path(self.text).is_dir():
            yield self.text, {module.name: module.A for module in load_adapter(self.text).modules}
            return
        config = LoraConfig.from_pretrained(str(self.folder))
        if config.init_lora_weights not in _DRAWN:
            raise ConfigurationError(
                f"init_lora_weights is {config.init_lora_weights!r}; no seed alone gives such an A"
            )
        config.inference_mode, config.base_model_name_or_path = False, None
        for seed in itertools.chain(*self._seeds()):
            yield f"seed {seed}", drawn(self.model, config, seed)

    def _seeds(self) -> list[range]:
        try:
            ends = [part.partition("-")[::2] for part in self.text.split(",")]
            return [range(int(first), int(last or first) + 1) for first, last in ends]
        except ValueError:
            raise ConfigurationError(f"{self.text!r} is neither a folder nor seeds such as 0-99,1234") from None


def drawn(model: nn.Module, config: LoraConfig, seed: int) -> dict[str, F32]:
    """A of every module as PEFT draws it where ``torch.manual_seed(seed)`` was the last to touch the generator."""
    # A copy of the structure that shares all weights: PEFT puts its layers into the model that it is given.
    shared: dict[int, object] = {id(one): one for one in model.buffers()}
    shared |= {id(one): nn.Parameter(one.detach(), requires_grad=False) for one in model.parameters()}
    copied = copy.deepcopy(model, shared)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(copied, copy.deepcopy(config))
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default"): module.weight.detach().numpy()
        for name, module in adapted.named_modules()
        if name.endswith(".lora_A.default")
    }


@dataclass(frozen=True)
class Probe:
    """Answers of one layer to signs drawn at random, to compare guesses with."""

    queries: F64 = field(repr=False)
    answers: F64 = field(repr=False)
    sigma: float

    def unexplained(self, basis: F64) -> tuple[float, float]:
        """(what is left, all) of the answers' mean square for a guessed row space (r, d), answer noise taken off."""
        known = self.queries @ basis.T
        rest = self.answers - known @ np.linalg.lstsq(known, self.answers, rcond=None)[0]
        left = float((rest**2).sum()) / (len(rest) - len(basis)) / rest.shape[1]
        return left - self.sigma**2, self.power

    @property
    def power(self) -> float:
        """The answers' mean square, answer noise taken off."""
        return float((self.answers**2).mean()) - self.sigma**2

    def variance(self, share: float) -> float:
        """Of what a wrong guess leaves unexplained, which is that ``share`` of the answers in the mean, and noise.

        A layer's answers are correlated: where few directions of the core hold most of it, they say less than as many
        independent ones. Their second moments are those of the sample, which errs on the large side.
        """
        count, outputs = self.answers.shape
        noise = self.sigma**2 * np.eye(outputs)
        left = share * (self.answers.T @ self.answers / count - noise) + noise
        return float(2 * (left**2).sum() / CHECKING_ROWS / outputs**2)


def probe(client: Client, layer: int, rows: int) -> Probe:
    """Asks a layer ``rows`` rows that no guess is preferred by."""
    width, sigma = client.layer(layer).width, client.sigma(layer)
    size = (HALF - MARGIN * sigma) / (client.layer(layer).norm_bound + 1) / math.sqrt(width)
    signs = np.random.default_rng(layer).choice([-1.0, 1.0], (rows, width))
    queries = np.rint(signs * size).astype(np.int64)
    return Probe(queries.astype(np.float64), client.ask(layer, residues(queries)).astype(np.float64), sigma)


@dataclass(frozen=True)
class Recognised:
    """The guess that leaves least unexplained of the answers of all layers."""

    name: str
    rows: Mapping[str, F32] = field(repr=False)
    surprise: float
    """√ of the unexplained share of the answers: 0 where A is as guessed, ``chance`` for a wrong guess."""
    chance: float
    certain: float
    """A surprise below this is no accident: if no guess is right, the least surprising is above it but for one time
    in 1/``FALSE_ALARM``."""

    @property
    def sure(self) -> bool:
        """Whether the guess is right, as far as its answers can tell."""
        return self.surprise <= self.certain

    @property
    def outside(self) -> float:
        """The share of the core's squared entries outside of the guessed rows."""
        return self.surprise**2


def recognise(client: Client, guesses: Iterable[Guess]) -> Recognised:
    """The best of ``guesses``, by r + ``CHECKING_ROWS`` rows of every layer, however many guesses there are.

    Raises ``ConfigurationError`` for a guess without one of the adapted modules.
    """
    widths = {layer.outputs[0][0]: layer.width for layer in client.publication.layers}
    probes: list[Probe] = []
    count, best, least, whole = 0, "", math.inf, 0.0
    chosen: Mapping[str, F32] = {}
    shares: list[float] = []
    for name, rows in guesses:
        count += 1
        missing = [module for module, width in widths.items() if module not in rows or rows[module].shape[1] != width]
        if missing:
            raise ConfigurationError(f"{name}: no A for {missing[0]!r}; give the folder of the same adapter, untrained")
        bases = [row_space(rows[module]) for module in widths]
        probes = probes or [probe(client, i, len(basis) + CHECKING_ROWS) for i, basis in enumerate(bases)]
        left, whole = np.array([one.unexplained(basis) for one, basis in zip(probes, bases, strict=True)]).sum(axis=0)
        if left / whole < least:
            best, chosen, least = name, rows, left / whole
            shares = [1 - len(basis) / basis.shape[1] for basis in bases]
    if not count:
        raise ConfigurationError("at least one guess at the initial A is needed")
    of_each = [(share * one.power, one.variance(share)) for one, share in zip(probes, shares, strict=True)]
    expected, variance = np.array(of_each).sum(axis=0) / (whole, whole**2)
    deviations = NormalDist().inv_cdf(1 - FALSE_ALARM / count)
    certain = expected - deviations * math.sqrt(variance)
    return Recognised(best, chosen, math.sqrt(max(least, 0.0)), math.sqrt(expected), math.sqrt(max(certain, 0.0)))
