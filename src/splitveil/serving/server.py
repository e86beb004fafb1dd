"""The vendor's server, from start to end: its port, its adapters, what its operator can have done to it."""

import logging
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import grpc

from splitveil.errors import ConfigurationError, SplitveilError
from splitveil.serving.address import is_loopback, require_loopback, split_address
from splitveil.serving.ending import close_at_exit, never
from splitveil.serving.gate import Doorkeeper, Gate, Open
from splitveil.serving.operations.exposition import Exposition
from splitveil.serving.operations.health import Health
from splitveil.serving.operations.logs import tell
from splitveil.serving.operations.metrics import Metrics
from splitveil.serving.operations.visits import Visits
from splitveil.serving.publishing import ServedAdapter
from splitveil.serving.service import Service
from splitveil.serving.threads import SessionThreads
from splitveil.serving.tls import ServerCredentials, ServerTLS
from splitveil.wire import codec

log = logging.getLogger(__name__)

DEFAULT_SESSIONS = 32
# Places for whoever is not in a session: told that there is no room; or asking for health; or on the way out.
SPARE_CALLS = 16

OPTIONS = [
    *codec.GRPC_OPTIONS,
    ("grpc.so_reuseport", 0),
    # A client whose machine has vanished is noticed by its missing pongs.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Clients do the same, through every pause of their user's; by default gRPC would end their connection for it.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
]


class Server:
    """Serves adapters until closed; a context manager. ``address`` says where, with the port that was bound.

    Raises ``ConfigurationError`` for an address that is malformed or taken, for certificates that cannot be used, and
    for an address beyond loopback without TLS, unless ``allow_plaintext``: queries reveal nothing, but anyone on the
    way could read API keys and answer in the server's stead.
    """

    def __init__(
        self,
        adapters: Mapping[str, ServedAdapter],
        listen: str = "127.0.0.1:7433",
        *,
        gate: Gate | None = None,
        keys: Doorkeeper | None = None,
        sessions: int = DEFAULT_SESSIONS,
        on_query: Callable[[str, codec.Query], None] | None = None,
        on_close: Callable[[], None] | None = None,
        on_replace: Callable[[str, ServedAdapter], None] | None = None,
        tls: ServerTLS | None = None,
        allow_plaintext: bool = False,
        metrics: str | None = None,
        log_identities: bool = False,
    ) -> None:
        """``gate`` may refuse rows, ``keys`` clients; without them all are answered.

        ``on_replace`` is called before an adapter is replaced, ``on_close`` once. ``metrics`` is where figures for
        Prometheus are served ("host:port"), ``log_identities`` lets the log name clients.
        """
        host, port = split_address(listen)
        if tls is None:
            require_loopback(
                host,
                "listen beyond loopback",
                allow_plaintext=allow_plaintext,
                instead="--tls-cert and --tls-key",
            )
        self._credentials = None if tls is None else ServerCredentials(tls)
        if not adapters:
            raise ConfigurationError("a server needs at least one adapter: --adapter NAME=DIR")
        figures = None if metrics is None else Metrics(adapters)
        if figures is not None and self._credentials is not None:
            figures.certificate_expires(self._credentials.expires.timestamp())
        self._visits = Visits(sessions, metrics=figures, log_identities=log_identities)
        self._service = Service(adapters, gate or Open(), keys, on_query, self._visits, sessions + SPARE_CALLS)
        self._versions = dict.fromkeys(adapters, 1)
        self._replacing = threading.Lock()
        self._on_replace = on_replace
        self._on_close = on_close
        self._threads = SessionThreads()
        threads: Any = self._threads  # gRPC asks for a ThreadPoolExecutor, and calls ``submit`` alone
        self._server = grpc.server(
            threads,
            handlers=[self._service, Health(lambda: self._visits.draining, SPARE_CALLS)],
            # Open sessions, those that have said nothing yet, health checks, and those that are being ended: each is
            # bounded by itself, so that none takes the others' places.
            maximum_concurrent_rpcs=2 * sessions + 3 * SPARE_CALLS,
            options=OPTIONS,
        )
        try:
            bound = self._bind(f"{host}:{port}")
        except RuntimeError:
            raise ConfigurationError(f"cannot listen on {listen}: is the port taken?") from None
        self.address = f"{host}:{bound}"
        self._exposition: Exposition | None = None
        if metrics is not None and figures is not None:
            try:
                self._exposition = Exposition(metrics, figures.registry, allow_plaintext=allow_plaintext)
            except ConfigurationError:
                self._server.stop(None)
                raise
        self._server.start()
        close_at_exit(self)

    def _bind(self, address: str) -> int:
        """The port. Raises ``RuntimeError``."""
        if self._credentials is None:
            return self._server.add_insecure_port(address)
        return self._server.add_secure_port(address, self._credentials.grpc)

    @property
    def transport(self) -> str:
        """How this server is reached, in words for its operator."""
        if self._credentials is None:
            here = is_loopback(split_address(self.address)[0])
            return "plaintext, this machine only" if here else "PLAINTEXT, also beyond this machine"
        return "TLS, clients show a certificate" if self._credentials.mutual else "TLS"

    @property
    def metrics_address(self) -> str | None:
        """Where figures for Prometheus are served, with the port that was bound; None if nowhere."""
        return None if self._exposition is None else self._exposition.address

    def source(self, name: str) -> str:
        """Digest of the folder that an adapter was made from; empty for one that was made otherwise."""
        return self._service.adapters[name].source

    def replace(self, name: str, adapter: ServedAdapter) -> None:
        """Serves ``adapter`` under ``name`` in place of what was served there; accounts carry on.

        Sessions that are open on the old one end at their next query, with an error that says to connect again: so what
        a vendor has replaced is never computed with again, nothing is counted under a declaration that is no longer in
        force, and no generation is half of one adapter and half of another.

        Raises ``ConfigurationError`` for a name that is not served, and as the ledger does; then the old adapter goes
        on, for sessions that have not asked meanwhile.
        """
        with self._replacing:
            if name not in self._service.adapters:
                raise ConfigurationError(f"no adapter named {name!r} is served here, so none can be replaced")
            # Withdrawn before the ledger hears of the new one: no row of the old weights is counted as one of the new.
            self._service.withdrawn.add(name)
            try:
                if self._on_replace is not None:
                    self._on_replace(name, adapter)
                self._service.adapters[name] = adapter
            finally:
                self._service.withdrawn.discard(name)
            self._versions[name] += 1
            if self._visits.metrics is not None:
                self._visits.metrics.adapter(name).published(self._versions[name])
        tell(log, logging.INFO, "adapter_replaced", adapter=name, publication=self._versions[name])

    def not_replaced(self, name: str, why: SplitveilError) -> None:
        """Notes that a new version of an adapter could not be had; the old one goes on."""
        if self._visits.metrics is not None:
            self._visits.metrics.adapter(name).replacement_failed()
        tell(log, logging.ERROR, "adapter_not_replaced", adapter=name, error=str(why))

    def renew_certificate(self) -> None:
        """Reads the TLS files again, for connections from now on. What cannot be used is logged and changes nothing."""
        if self._credentials is None:
            return
        try:
            self._credentials.renew()
        except ConfigurationError as error:
            tell(log, logging.ERROR, "certificate_not_renewed", error=str(error))
            return
        if self._visits.metrics is not None:
            self._visits.metrics.certificate_expires(self._credentials.expires.timestamp())
        tell(log, logging.INFO, "certificate_renewed", expires=self._credentials.expires.isoformat())

    def summary(self) -> list[str]:
        """One line an adapter: what is served, for the operator to read."""
        return [
            f"{name}: {len(adapter.publication.layers)} private layers, {len(adapter.published):,} bytes published, "
            f"noise {adapter.publication.noise:g}, parameters {adapter.publication.parameters_name}"
            for name, adapter in self._service.adapters.items()
        ]

    def wait(self) -> None:
        """Blocks until the server is closed."""
        self._server.wait_for_termination()

    def drain(self, seconds: float, hurry: Callable[[], bool] = never) -> None:
        """Closes, but lets sessions that are generating go on for ``seconds`` first, or until ``hurry()``.

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
        if self._exposition is not None:
            self._exposition.close(hurry)
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
