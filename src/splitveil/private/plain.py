"""The plain engine: the same interface, no protection. It lets every test of the protocol run without encryption too.

Server and client refuse it unless code allows insecure publications.
"""

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from splitveil.errors import NonFiniteError, ProtocolError
from splitveil.lattice.parameters import INSECURE_TEST
from splitveil.private.core import LayerSpec, gauged
from splitveil.private.engine import WRONG_LENGTH, Mask, NoMask, Pending, Site
from splitveil.private.published import Publication, PublicLayer

F64 = NDArray[np.float64]


class PlainServed:
    """All layers of one adapter, answering in the clear."""

    def __init__(self, cores: Sequence[F64]) -> None:
        self._cores = tuple(cores)

    def __repr__(self) -> str:
        return f"PlainServed({len(self._cores)} layers)"

    def check(self, layers: Sequence[int], rows: int, size: int) -> None:
        """Raises ``ProtocolError`` unless the query fits."""
        if not layers or not all(0 <= i < len(self._cores) for i in layers):
            raise ProtocolError("the query names a layer that the publication does not have")
        if rows < 1 or {8 * rows * self._cores[i].shape[1] for i in layers} != {size}:
            raise ProtocolError("the query's length does not fit its layers and rows")

    def answer(self, layers: Sequence[int], rows: int, query: bytes) -> bytes:
        """C·x in float64, the layers' (rows, rank) blocks one by one."""
        self.check(layers, rows, len(query))
        x = np.frombuffer(query, dtype="<f8").reshape(rows, -1)
        return b"".join((x @ self._cores[i].T).astype("<f8").tobytes() for i in layers)


class PlainPublic:
    """The client's side of the plain engine."""

    def __init__(self, publication: Publication) -> None:
        self.publication = publication

    def keys(self) -> bytes:
        """None."""
        return b""

    def site(self, layers: Sequence[int]) -> Site:
        """The view of some layers of equal width."""
        return PlainSite([self.publication.layers[i] for i in layers])


class PlainSite:
    """One site in the clear."""

    def __init__(self, layers: Sequence[PublicLayer]) -> None:
        self.width = layers[0].width
        self.ranks = tuple(layer.rank for layer in layers)
        self.query_size = 8 * self.width
        self.answer_size = 8 * sum(self.ranks)
        self.mask_size = 0

    def make_masks(self, rows: int) -> list[Mask]:
        """Nothing, ``rows`` times."""
        return [NoMask() for _ in range(rows)]

    def query(self, x: NDArray[np.float32], masks: Sequence[Mask]) -> tuple[bytes, Pending]:
        """x itself; zeros where it is not finite, as the lattice engine does."""
        rows = len(x)
        if x.shape != (rows, self.width) or len(masks) != rows:
            raise ValueError(f"got x of shape {x.shape} and {len(masks)} masks, expected ({rows}, {self.width})")
        finite = np.isfinite(x).all(axis=1, keepdims=True)
        sent = np.where(finite, x, 0).astype("<f8")
        return sent.tobytes(), Pending(rows, np.ones(rows), np.empty((rows, 0), np.uint32), bool(finite.all()))

    def recover(self, pending: Pending, answer: bytes) -> list[NDArray[np.float32]]:
        """C·x of every layer: (rows, rank) float32 each."""
        if len(answer) != pending.rows * self.answer_size:
            raise ProtocolError(WRONG_LENGTH)
        if not pending.finite:
            raise NonFiniteError("the input of a private layer is NaN or infinite")
        out, first = [], 0
        for rank in self.ranks:
            part = np.frombuffer(answer, dtype="<f8", count=pending.rows * rank, offset=8 * pending.rows * first)
            out.append(part.reshape(pending.rows, rank).astype(np.float32))
            first += rank
        return out


def publish(specs: Sequence[LayerSpec]) -> tuple[PlainServed, Publication]:
    """The two halves, in the clear."""
    cores, public = [], []
    for spec in specs:
        q, core = gauged(spec)
        cores.append(core)
        rank, width = core.shape
        q32 = None if q is None else q.astype(np.float32)
        public.append(PublicLayer(width, rank, 1.0, 1, spec.outputs, q32, None))
    publication = Publication(os.urandom(16), os.urandom(32), "plain", INSECURE_TEST, 0.0, tuple(public))
    return PlainServed(cores), publication
