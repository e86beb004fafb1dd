"""What an engine is: two halves of a set of private layers, and the client's view of one site.

An *engine* (lattice; sealed, which is CKKS; plain, for tests) makes a served half, which stays with the vendor,
and a public half, which every client may have. A *site* is a group of layers that read the same tensor: one query
serves them all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from splitveil.private.published import Publication

WRONG_LENGTH = "the server's answer is not as long as an answer to that query is"
"""One text for every wrong length: what a client says of an answer tells its server nothing."""


# Not frozen: one is made for every query, and a frozen one takes three times as long to make.
@dataclass(slots=True, eq=False)
class Pending:
    """What a client must keep between a query and its answer: secret, one-time, never on the wire."""

    rows: int
    factors: NDArray[np.float64] = field(repr=False)
    """(rows,) integer units of the query per unit of x; 0 where x was zero."""
    corrections: NDArray[np.uint32] = field(repr=False)
    """(rows, total rank) what the masks contribute to the answers."""
    finite: bool = True
    """False if some row was not finite: its zero query was sent all the same, and recovery raises."""


class Mask(Protocol):
    """The offline part of one query row, usable once."""

    @property
    def size(self) -> int:
        """Bytes that it occupies."""
        ...


@dataclass(frozen=True)
class NoMask:
    """For an engine that prepares nothing ahead of time."""

    size: int = 0


class Site(Protocol):
    """The client's side of some layers that read the same tensor of ``width`` features."""

    @property
    def width(self) -> int:
        """d: features of the input."""
        ...

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rows of each layer's answer, in order."""
        ...

    @property
    def query_size(self) -> int:
        """Bytes that one row sends."""
        ...

    @property
    def answer_size(self) -> int:
        """Bytes that one row receives."""
        ...

    @property
    def mask_size(self) -> int:
        """Bytes that one prepared mask occupies."""
        ...

    def make_masks(self, rows: int) -> list[Mask]:
        """The offline part: ``rows`` masks, independent of any input."""
        ...

    def query(self, x: NDArray[np.float32], masks: Sequence[Mask]) -> tuple[bytes, Pending]:
        """The online part: rows of x (rows, width), one mask each, to the bytes of the query."""
        ...

    def recover(self, pending: Pending, answer: bytes) -> list[NDArray[np.float32]]:
        """The core's outputs C·x of each layer, (rows, rank) each.

        Raises ``ProtocolError`` for an answer of the wrong length, ``NonFiniteError`` if x was not finite.
        """
        ...


class ServedHalf(Protocol):
    """The vendor's half: all private layers of one adapter."""

    def check(self, layers: Sequence[int], rows: int, size: int) -> None:
        """Raises ``ProtocolError`` unless a query of ``size`` bytes fits these layers and rows; no content is read."""
        ...

    def answer(self, layers: Sequence[int], rows: int, query: bytes) -> bytes:
        """Answers one query of ``rows`` rows for the given layers, which must read inputs of one width.

        Raises ``ProtocolError`` for a wrong layer or length, before anything is computed.
        """
        ...


class KeyedHalf(Protocol):
    """A served half that answers under keys which each client uploads once a session."""

    @property
    def key_size(self) -> int:
        """Bytes of a client's keys."""
        ...

    def opened(self, keys: bytes) -> ServedHalf:
        """The half as it answers the client whose keys these are. Raises ``ProtocolError`` for keys that are none."""
        ...


class PublicHalf(Protocol):
    """The half that every client may have."""

    @property
    def publication(self) -> Publication:
        """What was published."""
        ...

    def keys(self) -> bytes:
        """What a session uploads before its first query; empty for an engine that needs nothing."""
        ...

    def site(self, layers: Sequence[int]) -> Site:
        """The client's view of some layers of equal width, in the order in which answers are wanted."""
        ...
