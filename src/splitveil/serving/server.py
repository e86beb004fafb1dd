"""The vendor's server, from start to end: its port, its adapters, what its operator can have done to it."""

import logging
import threading
from collections.abc import Callable, Mapping

from splitveil.errors import ConfigurationError, SplitveilError
from splitveil.private.directions import ByLayer
from splitveil.serving.ending import never
from splitveil.serving.gate import Doorkeeper, Gate, Open
from splitveil.serving.host import SPARE_CALLS, Host
from splitveil.serving.operations.exposition import Exposition
from splitveil.serving.operations.health import Health
from splitveil.serving.operations.logs import tell
from splitveil.serving.operations.metrics import Metrics
from splitveil.serving.operations.visits import Visits
from splitveil.serving.publishing import ServedAdapter
from splitveil.serving.service import Service
from splitveil.serving.tls import ServerTLS
from splitveil.wire import codec

log = logging.getLogger(__name__)

DEFAULT_SESSIONS = 32


class Server(Host):
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
        super().__init__(listen, tls=tls, allow_plaintext=allow_plaintext)
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
        self._bound([self._service, Health(lambda: self._visits.draining, SPARE_CALLS)], sessions)
        self._exposition: Exposition | None = None
        if metrics is not None and figures is not None:
            try:
                self._exposition = Exposition(metrics, figures.registry, allow_plaintext=allow_plaintext)
            except ConfigurationError:
                self._server.stop(None)
                raise
        self._started()

    @property
    def metrics_address(self) -> str | None:
        """Where figures for Prometheus are served, with the port that was bound; None if nowhere."""
        return None if self._exposition is None else self._exposition.address

    def source(self, name: str) -> tuple[str, ByLayer | None]:
        """What an adapter was made from: its folder's digest, empty if none, and the directions kept there."""
        adapter = self._service.adapters[name]
        return adapter.source, adapter.directions

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

    def renew_certificate(self) -> bool:
        """As every host's; the figures name the new certificate."""
        renewed = super().renew_certificate()
        if renewed and self._visits.metrics is not None and self._credentials is not None:
            self._visits.metrics.certificate_expires(self._credentials.expires.timestamp())
        return renewed

    def summary(self) -> list[str]:
        """One line an adapter: what is served, for the operator to read."""
        return [
            f"{name}: {len(adapter.publication.layers)} private layers, {len(adapter.published):,} bytes published, "
            f"noise {adapter.publication.noise:g}, parameters {adapter.publication.parameters_name}"
            for name, adapter in self._service.adapters.items()
        ]

    def close(self, hurry: Callable[[], bool] = never) -> None:
        """As every host's; the figures are no longer served, and ``on_close`` is called, once."""
        super().close(hurry)
        if self._exposition is not None:
            self._exposition.close(hurry)
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()
