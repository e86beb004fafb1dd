"""What a clone is worth: held-out perplexity of the base model with it, beside the base's and the true adapter's."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from splitveil.errors import BaseModelError, DataError
from splitveil.extraction.target import Delta

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Add = Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]
_BATCH = 8
_RESAMPLES = 1000


@dataclass(frozen=True)
class Perplexity:
    """Of held-out text, with the interval of 95 % over its windows (percentile bootstrap)."""

    value: float
    low: float
    high: float
    nats: F64 = field(repr=False, compare=False)
    """(windows,) mean negative log-likelihood of each: windows of the same text are compared pair by pair."""


@dataclass(frozen=True)
class Text:
    """Windows of held-out text as token ids (windows, length)."""

    windows: Tensor = field(repr=False)

    @classmethod
    def of(cls, tokenizer: Any, texts: Sequence[str], *, tokens: int, length: int) -> "Text":
        """The first ``tokens`` tokens of ``texts``, one after the other, in windows that begin as a prompt does.

        Raises ``DataError`` where the texts do not fill two windows.
        """
        start = [i for i in tokenizer("")["input_ids"] if i != tokenizer.eos_token_id][:1]
        ids: list[int] = []
        for text in texts:
            if len(ids) >= tokens:
                break
            ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            ids += [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        room = length - len(start)
        count = min(len(ids), tokens) // room
        if count < 2:
            raise DataError(f"the text has {len(ids)} tokens, at least {2 * room} are needed; give more --data")
        return cls(torch.tensor([start + ids[i * room : (i + 1) * room] for i in range(count)]))

    def halves(self) -> tuple["Text", "Text"]:
        """Even windows and odd ones: what an attacker may read, and what clones are judged on."""
        return Text(self.windows[0::2]), Text(self.windows[1::2])

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.windows.numel()


@torch.no_grad()
def perplexity(model: nn.Module, text: Text, seed: int = 0) -> Perplexity:
    """exp of the mean negative log-likelihood of every token after a window's first."""
    nats = []
    for first in range(0, len(text.windows), _BATCH):
        batch = text.windows[first : first + _BATCH]
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
        nats.append(losses.mean(dim=1).double().numpy())
    means = np.concatenate(nats)
    low, high = np.percentile(_resampled(means, seed), [2.5, 97.5])
    return Perplexity(math.exp(means.mean()), float(low), float(high), means)


def share_lost(base: Perplexity, best: Perplexity, found: Perplexity, seed: int = 0) -> tuple[float, float, float]:
    """(found − best)/(base − best) with its interval of 95 % (percentile bootstrap): all three on the same windows."""
    worst, least, here = (_resampled(one.nats, seed) for one in (base, best, found))
    low, high = np.percentile((here - least) / (worst - least), [2.5, 97.5])
    return (found.value - best.value) / (base.value - best.value), float(low), float(high)


def _resampled(means: F64, seed: int) -> F64:
    """Perplexities of draws of windows, the same draws for every measurement of as many windows."""
    picks = np.random.default_rng(seed).integers(0, len(means), (_RESAMPLES, len(means)))
    found: F64 = np.exp(means[picks].mean(axis=1))
    return found


@contextmanager
def attached(model: nn.Module, deltas: Mapping[str, Delta]) -> Iterator[None]:
    """``model`` with ΔW added in its modules, for as long as the block lasts. Raises as ``hooked`` does."""

    def adder(delta: Delta) -> Add:
        down = torch.from_numpy(np.ascontiguousarray(delta.right.T, dtype=np.float32))
        up = torch.from_numpy(np.ascontiguousarray(delta.left.T, dtype=np.float32))

        def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            total: Tensor = output.float() + args[0].float() @ down @ up
            return total.to(output.dtype)

        return add

    with hooked(model, {name: adder(delta) for name, delta in deltas.items()}):
        yield


@contextmanager
def hooked(model: nn.Module, hooks: Mapping[str, Add]) -> Iterator[None]:
    """``model`` with forward hooks on the modules named. Raises ``BaseModelError`` where it has no such module."""
    modules = dict(model.named_modules())
    missing = sorted(hooks.keys() - modules.keys())
    if missing:
        raise BaseModelError(
            f"the base model has no module {missing[0]!r} ({len(missing)} such); give the adapter's own base model"
        )
    handles = [modules[name].register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def activations(model: nn.Module, text: Text, names: Sequence[str], rows: int) -> dict[str, F32]:
    """Inputs of the modules named on the first ``rows`` tokens of ``text``: (rows or fewer, d) each, float32."""
    kept: dict[str, list[F32]] = {name: [] for name in names}

    def keeper(name: str) -> Add:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            kept[name].append(args[0].reshape(-1, args[0].shape[-1]).float().numpy().copy())
            return output

        return keep

    with hooked(model, {name: keeper(name) for name in names}):
        for window in text.windows[: -(-rows // text.windows.shape[1])]:
            model(input_ids=window[None], use_cache=False)
    return {name: np.concatenate(parts)[:rows] for name, parts in kept.items()}
