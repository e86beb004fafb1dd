"""The information profile: for every cut, what its crossing tells about the token at a position, and about the text."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from splitveil.errors import ConfigurationError
from splitveil.information.estimate import Estimate, Estimator
from splitveil.information.gaussian import Capacity, Gaussian
from splitveil.information.infonce import InfoNCE
from splitveil.information.pairs import generator
from splitveil.information.renyi import MatrixRenyi
from splitveil.information.usable import Usable
from splitveil.split import Crossing, cut

TOKEN = "token"  # noqa: S105  what is asked about, not a secret
TEXT = "text"
PAIRS = 4000

Progress = Callable[[float, str], None]


def _silent(done: float, note: str) -> None:
    """Shows nothing."""


@dataclass(frozen=True)
class Row:
    """One estimator at one cut."""

    cut: int
    target: str
    """``TOKEN``: x is the crossing at one position, y the token there. ``TEXT``: x is the mean of a text's positions,
    y the mean of its input embeddings."""
    estimate: Estimate

    @property
    def estimator(self) -> str:
        return self.estimate.name


@dataclass(frozen=True)
class _Question:
    """An estimator, what it is asked about, and whether y is the ids or the vectors that stand for them."""

    estimator: Estimator
    target: str
    by_id: bool


QUESTIONS = (
    _Question(Usable(), TOKEN, True),
    _Question(InfoNCE(), TOKEN, False),
    _Question(MatrixRenyi(), TOKEN, True),
    _Question(Gaussian(), TOKEN, False),
    _Question(InfoNCE(), TEXT, False),
)


@torch.no_grad()
def crossings(
    model: Any, tokens: Tensor, mask: Tensor | None = None, *, cuts: Sequence[int] | None = None, batch: int = 32
) -> Iterator[tuple[int, Crossing]]:
    """(cut, what crosses there) of ``tokens`` (texts, positions), one cut at a time; by default every cut.

    Raises what ``splitveil.split.cut`` raises.
    """
    mask = torch.ones_like(tokens) if mask is None else mask
    blocks = cut(model, 0).blocks
    for block in range(blocks + 1) if cuts is None else cuts:
        device = cut(model, block).device
        parts = [device(tokens[i : i + batch], mask[i : i + batch]).hidden for i in range(0, len(tokens), batch)]
        yield block, Crossing(torch.cat(parts), mask)


def profile(
    crossed: Iterable[tuple[int, Crossing]],
    tokens: Tensor,
    embeddings: Tensor,
    *,
    pairs: int = PAIRS,
    seed: int = 0,
    progress: Progress = _silent,
    total: int = 0,
) -> list[Row]:
    """Every estimator's figure at every cut; a defence that was applied to the crossings is measured with them.

    ``tokens`` (texts, positions) are the ids that crossed and ``embeddings`` (vocabulary, width) the public model's.
    At most ``pairs`` positions are looked at, the same ones at every cut. Padding is left out, and so is a position
    where all texts have the same token: nothing can be learnt about what is known. ``total`` is how many cuts
    there will be, for ``progress``.

    What is told about a token is what its own position tells; later positions repeat some of it.

    Raises ``ConfigurationError`` where crossings and tokens do not fit together or all texts are the same,
    ``NonFiniteError`` for NaN or infinity.
    """
    rows: list[Row] = []
    for number, (block, crossing) in enumerate(crossed):
        hidden = crossing.hidden.detach().cpu().double()
        text, texts, positions = _places(crossing, tokens, pairs, seed)
        ids = tokens.cpu()[texts, positions]
        weight = embeddings.detach().cpu().double()
        pooled, meant = _pooled(hidden, text), _pooled(weight[tokens.cpu()], text)
        for step, question in enumerate(QUESTIONS):
            done = (number + step / len(QUESTIONS)) / total if total else 0.0
            progress(done, f"cut {block}: {question.estimator.name}, {question.target}")
            if question.target == TOKEN:
                y = ids if question.by_id else weight[ids]
                found = question.estimator.estimate(hidden[texts, positions], y, seed=seed, groups=texts)
            else:
                found = question.estimator.estimate(pooled, meant, seed=seed)
            rows.append(Row(block, question.target, found))
    return rows


def ceilings(
    crossed: Iterable[tuple[int, Crossing]], tokens: Tensor, noise: float, *, pairs: int = PAIRS, seed: int = 0
) -> list[Row]:
    """The most that a position can tell, at every cut, once Gaussian noise of deviation ``noise`` is added to it.

    ``crossed`` holds the crossings before the noise. Raises as ``profile`` does.
    """
    rows = []
    for block, crossing in crossed:
        _, texts, positions = _places(crossing, tokens, pairs, seed)
        x, y = crossing.hidden.detach().cpu()[texts, positions], tokens.cpu()[texts, positions]
        rows.append(Row(block, TOKEN, Capacity(noise).estimate(x, y, seed=seed, groups=texts)))
    return rows


def _places(crossing: Crossing, tokens: Tensor, pairs: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """What is looked at: (texts, positions) of bool, and of at most ``pairs`` of those the text and the position."""
    if crossing.hidden.shape[:2] != tokens.shape:
        raise ConfigurationError(
            f"the crossing holds {tuple(crossing.hidden.shape[:2])} texts and positions, the tokens are "
            f"{tuple(tokens.shape)}"
        )
    text = crossing.text.cpu()
    text = text & _open(tokens.cpu(), text)
    if not bool(text.any()):
        raise ConfigurationError("all texts have the same tokens, so there is nothing to be told: give different ones")
    places = torch.nonzero(text)
    texts, positions = places[torch.randperm(len(places), generator=generator(seed))[:pairs]].unbind(1)
    return text, texts, positions


def _open(tokens: Tensor, text: Tensor) -> Tensor:
    """(positions,): where not all texts have the same token."""
    largest = tokens.masked_fill(~text, -1).amax(0)
    smallest = tokens.masked_fill(~text, torch.iinfo(tokens.dtype).max).amin(0)
    return largest != smallest


def _pooled(rows: Tensor, text: Tensor) -> Tensor:
    """(texts, width): the mean over a text's positions."""
    weight = text.double()[..., None]
    return (rows * weight).sum(1) / weight.sum(1).clamp(min=1)
