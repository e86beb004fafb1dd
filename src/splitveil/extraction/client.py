"""A malicious client: it writes its query words itself. What it may use is what every client has, and nothing else.

The server checks lengths and nothing more, since every vector is a valid query. So this client encrypts with the secret
0 and without errors: the words of a query are then x̂ itself, the pad's words are 0, and of the answer
⟨C_j, x̂⟩ + g_j nothing has to be taken off. Its own privacy is not what it is after.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from splitveil.errors import ConfigurationError
from splitveil.lattice.parameters import Q
from splitveil.private.bound import budget
from splitveil.private.published import Publication, PublicLayer

I64 = NDArray[np.int64]
F64 = NDArray[np.float64]
Answer = Callable[[Sequence[int], int, bytes], bytes]
"""(layers, rows, query) to answer: ``ServedHalf.answer``, or a session with a server."""
BATCH = 512
"""Rows of one message."""


class Client:
    """One attacker: the publication, a way to get answers, and a count of the rows answered, layer by layer."""

    def __init__(self, publication: Publication, answer: Answer) -> None:
        if publication.engine != "lattice":
            raise ConfigurationError(f"these queries are for the lattice engine, not for {publication.engine!r}")
        self.publication = publication
        self._answer = answer
        self.rows = [0] * len(publication.layers)

    def layer(self, index: int) -> PublicLayer:
        """The published half of one layer."""
        return self.publication.layers[index]

    def sigma(self, index: int) -> float:
        """σ_g of a layer's answers, as everybody can compute it."""
        layer = self.layer(index)
        return budget(self.publication.parameters, layer.width, layer.norm_bound, self.publication.noise).answer_sigma

    def ask(self, index: int, queries: NDArray[np.uint32]) -> I64:
        """⟨C_j, x̂⟩ + g_j for queries (rows, d) mod q: (rows, rank), centred mod q."""
        layer = self.layer(index)
        width = self.publication.parameters.query_width(layer.width)
        parts = []
        for first in range(0, len(queries), BATCH):
            part = queries[first : first + BATCH]
            words = np.zeros((len(part), width), dtype="<u4")
            words[:, : layer.width] = part
            answer = self._answer([index], len(part), words.tobytes())
            parts.append(np.frombuffer(answer, dtype="<u4").reshape(len(part), layer.rank))
        self.rows[index] += len(queries)
        return centred(np.concatenate(parts)) if parts else np.empty((0, layer.rank), dtype=np.int64)


def centred(words: NDArray[np.uint32]) -> I64:
    """Residues mod q as the integers of least absolute value."""
    return np.ascontiguousarray(words, dtype=np.uint32).view(np.int32).astype(np.int64)


def residues(integers: I64) -> NDArray[np.uint32]:
    """Integers mod q."""
    return (integers % Q).astype(np.uint32)
