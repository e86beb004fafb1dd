"""Which adapted modules read the same tensor: learned by watching one forward pass, checked in every later one.

In Llama q, k and v share their input, in Phi ``mlp.fc1`` reads it too. One query then serves all of them. Modules are
grouped by the identity of the tensor they receive (the same object, unchanged since), never by name, so grouping
changes the cost and not the result: whoever receives another tensor than expected sends a query of its own.
"""

from collections import deque
from dataclasses import dataclass, field

import torch

# Tensors whose readers are still being looked for. Phi's parallel blocks need two; holding on to few keeps the first
# forward pass of a long prompt within its memory.
_OPEN = 4


@dataclass(frozen=True, eq=False)
class Seen:
    """A tensor at one moment: the object itself, held so that its identity is not given to another, and its version."""

    tensor: torch.Tensor = field(repr=False)
    version: int | None

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Seen":
        """``tensor`` now. Inference tensors keep no version."""
        return cls(tensor, None if tensor.is_inference() else tensor._version)

    def is_now(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is the same object, provably unchanged."""
        if self.tensor is not tensor:
            return False
        return self.version is not None and not tensor.is_inference() and self.version == tensor._version


class SiteLearner:
    """Watches which modules are called with which tensor, during one forward pass."""

    def __init__(self) -> None:
        self._open: deque[tuple[torch.Tensor, int | None, list[str]]] = deque(maxlen=_OPEN)
        self._groups: list[list[str]] = []
        self._seen: set[str] = set()

    def saw(self, name: str, tensor: torch.Tensor) -> None:
        """Module ``name`` was called with ``tensor``; only its first call counts."""
        if name in self._seen:
            return
        self._seen.add(name)
        version = None if tensor.is_inference() else tensor._version
        for known, known_version, group in self._open:
            if known is tensor and known_version == version:
                group.append(name)
                return
        group = [name]
        self._groups.append(group)
        self._open.append((tensor, version, group))

    @property
    def seen(self) -> frozenset[str]:
        """Modules that were called."""
        return frozenset(self._seen)

    def groups(self) -> list[tuple[str, ...]]:
        """The groups, in the order of their first calls."""
        return [tuple(group) for group in self._groups]
