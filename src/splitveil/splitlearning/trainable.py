"""Parameters with their accumulated gradients and their optimiser: the half of training that each side does alone."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from splitveil.errors import ConfigurationError, NonFiniteError, RefusedError
from splitveil.splitlearning.interface import Optimiser

SMALLEST_EPSILON = 1e-12
"""Below it a gradient of zero divides zero by zero."""
LARGEST_GRADIENT = 1e15
"""Its square is far from the end of float32, and no training gets near it."""
_KINDS = ("exp_avg", "exp_avg_sq")


class Trainable:
    """What one side trains: AdamW on named parameters, and what was accumulated since its last step.

    Gradients are checked before they are added: no parameter and no sum ever becomes NaN or infinite.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], optimiser: Optimiser) -> None:
        """Raises ``ConfigurationError`` for an epsilon that AdamW cannot divide by."""
        if optimiser.epsilon < SMALLEST_EPSILON:
            raise ConfigurationError(f"epsilon is at least {SMALLEST_EPSILON}, got {optimiser.epsilon}")
        self.parameters = parameters
        self._decay = optimiser.weight_decay
        self.steps = 0
        """Steps made since the run began."""
        self.batches = 0
        """Micro-batches accumulated since the last step."""
        self._sums: list[Tensor | None] = [None] * len(parameters)
        # An optimiser of nothing is an error to torch, and normal here: a cut at either end.
        self._adam = (
            torch.optim.AdamW(
                list(parameters.values()),
                lr=0.0,
                betas=(optimiser.beta1, optimiser.beta2),
                eps=optimiser.epsilon,
                weight_decay=optimiser.weight_decay,
            )
            if parameters
            else None
        )

    def __repr__(self) -> str:
        return f"Trainable({len(self.parameters)} tensors, {self.steps} steps)"

    @property
    def list(self) -> "list[nn.Parameter]":
        """The parameters, in their order."""
        return [*self.parameters.values()]

    def accumulate(self, gradients: Sequence[Tensor | None]) -> None:
        """Adds one micro-batch's gradients, one for each of ``list``; None where the loss does not depend on it.

        Raises ``NonFiniteError`` and adds none of them where one is NaN, infinite or beyond ``LARGEST_GRADIENT``.
        """
        sums = [
            new if old is None else old if new is None else old + new
            for old, new in zip(self._sums, gradients, strict=True)
        ]
        for name, total in zip(self.parameters, sums, strict=True):
            if total is not None and not bool(total.abs().amax() <= LARGEST_GRADIENT):
                raise NonFiniteError(f"the gradient of {name} is NaN, infinite or above {LARGEST_GRADIENT:g}")
        self._sums, self.batches = sums, self.batches + 1

    def discard(self) -> None:
        """Forgets what was accumulated."""
        self._sums, self.batches = [None] * len(self.parameters), 0

    def step(self, rate: float) -> None:
        """One step of AdamW.

        Raises ``RefusedError`` without anything accumulated, for a rate outside [0, 1], and for one with which the
        weight decay would let weights grow without end.
        """
        if not (math.isfinite(rate) and 0 <= rate <= 1):
            raise RefusedError(f"a learning rate is a number from 0 to 1, got {rate}")
        if not rate * self._decay <= 1:
            raise RefusedError(
                f"a learning rate of {rate} with a weight decay of {self._decay} makes weights larger; their product "
                "is at most 1"
            )
        if self.batches == 0:
            raise RefusedError("a step needs at least one micro-batch since the last one")
        if self._adam is not None:
            self._adam.param_groups[0]["lr"] = rate
            for parameter, total in zip(self.parameters.values(), self._sums, strict=True):
                parameter.grad = total
            self._adam.step()
            self._adam.zero_grad(set_to_none=True)
        self.steps += 1
        self.discard()

    def state(self) -> dict[str, Tensor]:
        """Parameters and optimiser, by name: all that the next step depends on but ``steps``."""
        tensors = {f"weight.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            found = {} if self._adam is None else self._adam.state.get(parameter, {})
            if found:
                tensors |= {f"{kind}.{name}": found[kind] for kind in _KINDS}
                tensors[f"count.{name}"] = found["step"].reshape(1)
        return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}

    def restore(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Puts back what ``state`` gave. Raises ``ConfigurationError``, changing nothing, for what does not fit."""
        expected = {f"weight.{name}": parameter for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            if f"count.{name}" in tensors:
                expected |= {f"{kind}.{name}": parameter for kind in _KINDS}
        counts = {name for name in tensors if name.startswith("count.")}
        if tensors.keys() - counts != expected.keys():
            odd = min((tensors.keys() - counts) ^ expected.keys())
            raise ConfigurationError(f"a checkpoint of another plan or model: {odd} is on one side only")
        for name, tensor in tensors.items():
            shape = (1,) if name in counts else tuple(expected[name].shape)
            if tuple(tensor.shape) != shape:
                raise ConfigurationError(
                    f"a checkpoint of another plan or model: {name} is {tuple(tensor.shape)}, expected {shape}"
                )
            if not bool(tensor.isfinite().all()):
                raise ConfigurationError(f"a checkpoint is damaged: {name} holds numbers that are not finite")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"weight.{name}"])
                if self._adam is None:
                    continue
                self._adam.state.pop(parameter, None)
                if f"count.{name}" in tensors:
                    state = {kind: tensors[f"{kind}.{name}"].clone().to(parameter.device) for kind in _KINDS}
                    self._adam.state[parameter] = {"step": tensors[f"count.{name}"].clone().reshape(()), **state}
        self.steps = steps
        self.discard()
