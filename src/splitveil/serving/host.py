"""A gRPC server of ours, from start to end, whatever it serves: its address, its transport, its threads."""

import logging
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

import grpc

from splitveil.errors import ConfigurationError
from splitveil.serving.address import is_loopback, require_loopback, split_address
from splitveil.serving.ending import close_at_exit, never
from splitveil.serving.operations.logs import tell
from splitveil.serving.operations.visits import Visits
from splitveil.serving.threads import SessionThreads
from splitveil.serving.tls import ServerCredentials, ServerTLS
from splitveil.wire.parsing import GRPC_OPTIONS

log = logging.getLogger(__name__)
Self = TypeVar("Self", bound="Host")

# Places for whoever is not in a session: told that there is no room; or asking for health; or on the way out.
SPARE_CALLS = 16

OPTIONS = [
    *GRPC_OPTIONS,
    ("grpc.so_reuseport", 0),
    # A client whose machine has vanished is noticed by its missing pongs.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Clients do the same, through every pause of their user's; by default gRPC would end their connection for it.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
]


class Host:
    """Listens until closed; a context manager. ``address`` says where, with the port that was bound.

    First made, then ``_bound`` to its handlers, then ``_started``. Raises ``ConfigurationError`` for an address that is
    malformed or taken, for certificates that cannot be used, and for an address beyond loopback without TLS, unless
    ``allow_plaintext``.
    """

    _visits: Visits
    """Set by who inherits, before ``_bound``."""

    def __init__(self, listen: str, *, tls: ServerTLS | None, allow_plaintext: bool) -> None:
        self._listen = listen
        self._host, self._port = split_address(listen)
        if tls is None:
            require_loopback(
                self._host,
                "listen beyond loopback",
                allow_plaintext=allow_plaintext,
                instead="--tls-cert and --tls-key",
            )
        self._credentials = None if tls is None else ServerCredentials(tls)
        self._threads = SessionThreads()

    def _bound(self, handlers: Sequence[grpc.GenericRpcHandler], sessions: int) -> None:
        """Takes the port. ``sessions`` is how many may be open at once."""
        threads: Any = self._threads  # gRPC asks for a ThreadPoolExecutor, and calls ``submit`` alone
        self._server = grpc.server(
            threads,
            handlers=list(handlers),
            # Open sessions, those that have said nothing yet, health checks, and those that are being ended: each is
            # bounded by itself, so that none takes the others' places.
            maximum_concurrent_rpcs=2 * sessions + 3 * SPARE_CALLS,
            options=OPTIONS,
        )
        try:
            address = f"{self._host}:{self._port}"
            if self._credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, self._credentials.grpc)
        except RuntimeError:
            raise ConfigurationError(f"cannot listen on {self._listen}: is the port taken?") from None
        self.address = f"{self._host}:{port}"

    def _started(self) -> None:
        self._server.start()
        close_at_exit(self)

    @property
    def transport(self) -> str:
        """How this server is reached, in words for its operator."""
        if self._credentials is None:
            here = is_loopback(split_address(self.address)[0])
            return "plaintext, this machine only" if here else "PLAINTEXT, also beyond this machine"
        return "TLS, clients show a certificate" if self._credentials.mutual else "TLS"

    def renew_certificate(self) -> bool:
        """Reads the TLS files again, for connections from now on. What cannot be used is logged and changes nothing.

        Returns whether there is a new certificate.
        """
        if self._credentials is None:
            return False
        try:
            self._credentials.renew()
        except ConfigurationError as error:
            tell(log, logging.ERROR, "certificate_not_renewed", error=str(error))
            return False
        tell(log, logging.INFO, "certificate_renewed", expires=self._credentials.expires.isoformat())
        return True

    def wait(self) -> None:
        """Blocks until the server is closed."""
        self._server.wait_for_termination()

    def drain(self, seconds: float, hurry: Callable[[], bool] = never) -> None:
        """Closes, but lets sessions that are being answered go on for ``seconds`` first, or until ``hurry()``.

        No session begins meanwhile, and health checks say so. Sessions without a query for a second are not waited for.
        """
        self._visits.drain(seconds, hurry)
        self.close(hurry)
        tell(log, logging.INFO, "stopped")

    def close(self, hurry: Callable[[], bool] = never) -> None:
        """Ends all sessions and stops listening; safe to call twice.

        Answers that are being computed are waited for, ``ending.PATIENCE`` seconds at most, less once ``hurry()``.
        """
        self._visits.draining = True
        self._server.stop(grace=0.5).wait()
        self._threads.end(hurry)

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
