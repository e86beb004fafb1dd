"""The entries of every state in a secret order."""

import hashlib
import secrets
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from splitveil.split import Crossing


class Permutation:
    """One secret permutation of the entries, which a key of the device's decides.

    Who can only look does not know which entry is which. Who can also run the device's program, as attacks that query
    it do, learns from permuted states as well as from any others: a fixed key costs such an attacker nothing, and the
    audit shows it. Lengths, angles and all statistics that do not name an entry are kept, too.
    """

    name: ClassVar[str] = "permutation"
    summary: ClassVar[str] = "each state's entries in a secret order, the same for all"
    KEY: ClassVar[int] = 32
    """Bytes of a key."""

    def __init__(self, seed: int | None = None, *, key: bytes | None = None) -> None:
        """``seed`` makes the order repeatable, so that an audit can be resumed; never for a device.

        ``key`` is one that was kept: upper blocks that learnt from states in one order understand no other. Without
        both a key is drawn.
        """
        self._orders: dict[int, Tensor] = {}
        self._seed = seed
        self._key = secrets.token_bytes(self.KEY) if key is None else key

    @property
    def key_digest(self) -> str:
        """Tells one key from another, and nothing of either."""
        return hashlib.sha256(b"splitveil permutation" + self._key).hexdigest()

    @property
    def params(self) -> Mapping[str, float | int | str]:
        """None: the order is a key."""
        return {}

    def width(self, width: int) -> int:
        """How wide the defended crossing of a plain one of ``width`` is: the same."""
        return width

    def bytes_a_position(self, width: int) -> float:
        """Float32 numbers: 4 · width."""
        return 4.0 * width

    def protect(self, crossing: Crossing) -> Crossing:
        """The same dtype and shape; positions without text stay as they are."""
        hidden = crossing.hidden.clone()
        hidden[crossing.text] = crossing.hidden[crossing.text][:, self._order(crossing.width).to(hidden.device)]
        return crossing.with_hidden(hidden)

    def _order(self, width: int) -> Tensor:
        if width not in self._orders:
            self._orders[width] = self._drawn(width)
        return self._orders[width]

    def _drawn(self, width: int) -> Tensor:
        if self._seed is not None:
            return torch.randperm(width, generator=torch.Generator().manual_seed(self._seed))
        # Sorting by pseudorandom numbers of 64 bits: two that are equal would only favour one order a little.
        numbers = np.frombuffer(hashlib.shake_256(self._key).digest(8 * width), dtype="<u8")
        return torch.from_numpy(numbers.argsort(kind="stable"))
