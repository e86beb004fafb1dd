"""A model whose adapter is served: the protocol's own client code and answers, without a socket in between."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from splitveil.extraction.target import Target
from splitveil.extraction.worth import Add, hooked
from splitveil.private.layer import public_half
from splitveil.serving.sites import SiteLearner


@contextmanager
def served(model: nn.Module, target: Target) -> Iterator[None]:
    """``model`` with the answers of ``target`` added in its modules, for as long as the block lasts.

    Modules that read one tensor share a query, as they do for a real client. Raises ``BaseModelError`` for a model
    that lacks an adapted module.
    """
    publication = target.publication
    place = {
        name: (index, first)
        for index, layer in enumerate(publication.layers)
        for first, (name, _) in zip(_starts(layer.outputs), layer.outputs, strict=True)
    }
    group_of = _groups(model, list(place))
    half = public_half(publication)
    current: dict[tuple[str, ...], tuple[Tensor, dict[int, Tensor]]] = {}

    def ask(group: tuple[str, ...], x: Tensor) -> dict[int, Tensor]:
        layers = tuple(dict.fromkeys(place[name][0] for name in group))
        site = half.site(layers)
        rows = np.ascontiguousarray(x.detach().reshape(-1, x.shape[-1]).float().numpy())
        query, pending = site.query(rows, site.make_masks(len(rows)))
        answers = site.recover(pending, target.served.half.answer(layers, len(rows), query))
        return {layer: torch.from_numpy(answer) for layer, answer in zip(layers, answers, strict=True)}

    def adder(name: str) -> Add:
        index, first = place[name]
        q = publication.layers[index].Q

        def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            group = group_of[name]
            if group not in current or current[group][0] is not args[0]:
                current[group] = (args[0], ask(group, args[0]))
            core = current[group][1][index]
            delta = core if q is None else core @ torch.from_numpy(q[first : first + output.shape[-1]]).T
            return (output.float() + delta.reshape(output.shape)).to(output.dtype)

        return add

    with hooked(model, {name: adder(name) for name in place}):
        yield


def _starts(outputs: tuple[tuple[str, int], ...]) -> list[int]:
    """Where each output's rows of Q begin."""
    return [sum(size for _, size in outputs[:index]) for index in range(len(outputs))]


@torch.no_grad()
def _groups(model: nn.Module, names: list[str]) -> dict[str, tuple[str, ...]]:
    """Module to all modules that read the same tensor as it does."""
    learner = SiteLearner()

    def watcher(name: str) -> Add:
        def watch(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            learner.saw(name, args[0])
            return output

        return watch

    with hooked(model, {name: watcher(name) for name in names}):
        model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    return {name: group for group in learner.groups() for name in group}
