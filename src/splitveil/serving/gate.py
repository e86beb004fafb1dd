"""Where a server may refuse: a client at the beginning of its session, and its rows before they are computed."""

from collections.abc import Sequence
from typing import Protocol

import grpc

from splitveil.errors import BudgetExceededError, KeyRejectedError, RefusedError

ANONYMOUS = "anonymous"

BUDGET_SPENT = "this client's row budget is spent at every layer of the adapter; ask the vendor for more"
"""What a client without any rows left is told when it begins a session, word for word: it tells this from a server
without a place left by it, whose status is the same."""


class Rejected(Exception):  # noqa: N818 - not an error of ours: it ends a session with a status
    """Ends a session with a gRPC status of its own; ``reason`` is one word for logs and metrics."""

    def __init__(self, status: grpc.StatusCode, message: str, reason: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


class Gate(Protocol):
    """Decides whether a client may have its rows answered."""

    def require_rows_left(self, identity: str, adapter: str) -> None:
        """Returns if any query might be allowed, raises ``RefusedError`` if none will; called at the beginning."""
        ...

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

    def require_rows_left(self, identity: str, adapter: str) -> None:
        """There are always more."""

    def reserve_all(self, identity: str, adapter: str, modules: Sequence[str], rows: int) -> None:
        """Allows."""


class Anyone:
    """Whoever comes, under one name."""

    identity = ANONYMOUS

    def check(self) -> None:
        """Stays."""


def identify(keys: Doorkeeper | None, key: str, adapter: str) -> Admitted:
    """Who shows ``key`` (empty: nobody) and asks for ``adapter``; without ``keys`` anyone is let in.

    Raises ``Rejected``. To be called before anything is looked up: who has no key does not learn what there is.
    """
    unauthenticated = grpc.StatusCode.UNAUTHENTICATED
    if keys is None:
        if key:
            raise Rejected(unauthenticated, "this server knows no API keys; connect without one", "key")
        return Anyone()
    if not key:
        raise Rejected(unauthenticated, "this server asks for an API key, which its vendor makes", "key")
    try:
        return keys.admit(key, adapter)
    except KeyRejectedError as error:
        raise Rejected(unauthenticated, str(error), "key") from None
    except RefusedError as error:
        raise Rejected(grpc.StatusCode.PERMISSION_DENIED, str(error), "database") from None


def require_rows_left(gate: Gate, client: Admitted, adapter: str) -> None:
    """Raises ``Rejected`` for a client that would be refused every row. To be called once it is known who it is."""
    try:
        gate.require_rows_left(client.identity, adapter)
    except BudgetExceededError:
        raise Rejected(grpc.StatusCode.RESOURCE_EXHAUSTED, BUDGET_SPENT, "budget") from None
    except RefusedError as error:
        raise Rejected(grpc.StatusCode.PERMISSION_DENIED, str(error), "database") from None


def other_version(got: int, served: int) -> Rejected:
    """The client speaks another version of the protocol."""
    message = f"protocol version {got} is not served here, only {served}"
    return Rejected(grpc.StatusCode.FAILED_PRECONDITION, message, "version")


def declined(message: str) -> Rejected:
    """What the client asks for is not done here."""
    return Rejected(grpc.StatusCode.PERMISSION_DENIED, message, "declined")


def dismissed(error: KeyRejectedError) -> Rejected:
    """A client that was let in may stay no longer."""
    return Rejected(grpc.StatusCode.UNAUTHENTICATED, str(error), "key")


def full(what: str) -> Rejected:
    """There is no room for one more."""
    return Rejected(grpc.StatusCode.RESOURCE_EXHAUSTED, f"too many {what} are open", "sessions")
