"""Where a server may refuse: a client at the beginning of its session, and its rows before they are computed."""

from collections.abc import Sequence
from typing import Protocol

import grpc

ANONYMOUS = "anonymous"


class Rejected(Exception):  # noqa: N818 - not an error of ours: it ends a session with a status
    """Ends a session with a gRPC status of its own; ``reason`` is one word for logs and metrics."""

    def __init__(self, status: grpc.StatusCode, message: str, reason: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


class Gate(Protocol):
    """Decides whether a client may have its rows answered."""

    def reserve_all(self, identity: str, adapter: str, modules: Sequence[str], rows: int) -> None:
        """Returns to allow, raises ``RefusedError`` to refuse; called for every query, before the kernel.

        All layers of the query are reserved or none: a refusal must not cost anything.
        """
        ...


class Admitted(Protocol):
    """A client that was let in."""

    @property
    def identity(self) -> str:
        """The name that its rows are counted for."""

    def check(self) -> None:
        """Raises ``KeyRejectedError`` when it may stay no longer; called for every query."""


class Doorkeeper(Protocol):
    """Decides who may open a session."""

    def admit(self, key: str, adapter: str) -> Admitted:
        """Raises ``KeyRejectedError`` for a key that does not open ``adapter``, known or not."""
        ...


class Open:
    """Allows everything: nothing is metered."""

    def reserve_all(self, identity: str, adapter: str, modules: Sequence[str], rows: int) -> None:
        """Allows."""


class Anyone:
    """Whoever comes, under one name."""

    identity = ANONYMOUS

    def check(self) -> None:
        """Stays."""
