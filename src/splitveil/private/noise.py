"""Fresh noise for every answer, drawn in blocks ahead of time so that an answer does not wait for a sampler."""

import os
import threading
import weakref
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from splitveil.lattice.sampling import discrete_gaussian

BLOCK = 4096
_alive: "weakref.WeakSet[AnswerNoise]" = weakref.WeakSet()


class AnswerNoise:
    """Discrete Gaussians of one σ_g, handed out once each.

    Safe for several threads. After a fork the child draws anew, so that two processes never share a value.
    """

    def __init__(self, sigma: float) -> None:
        self._sigma = sigma
        self._empty()
        _alive.add(self)

    def _empty(self) -> None:
        # A fork may have come while another thread held the lock, which nobody would release in the child.
        self._lock = threading.Lock()
        self._values: NDArray[np.uint32] = np.empty(0, dtype=np.uint32)
        self._process = os.getpid()

    def __reduce__(self) -> NoReturn:
        raise TypeError("answer noise is neither copied nor pickled: a copy would hand out the same values")

    def take(self, rows: int, width: int) -> NDArray[np.uint32]:
        """(rows, width) noise values mod 2^32, none of which was or will be handed out again."""
        count = rows * width
        with self._lock:
            if self._process != os.getpid() or len(self._values) < count:
                fresh = discrete_gaussian(max(BLOCK, count), self._sigma)
                self._values = (fresh & 0xFFFFFFFF).astype(np.uint32)
                self._process = os.getpid()
            taken, self._values = self._values[:count], self._values[count:]
        return taken.reshape(rows, width).copy()


def _after_fork_in_child() -> None:
    for noise in list(_alive):
        noise._empty()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_after_fork_in_child)
