"""``serve``: adapter folders to a running server."""

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path

from splitveil.adapters import Adapter, load_adapter
from splitveil.errors import ConfigurationError, SplitveilError
from splitveil.metering import Clock, Database, Keyring, LedgerGate, Site, locate
from splitveil.serving.address import check_adapter_name
from splitveil.serving.directions import check_directions, read_directions_file
from splitveil.serving.exposure import rows_until_learned, sites_of
from splitveil.serving.gauge_key import gauge_key as read_gauge_key
from splitveil.serving.heartbeat import Heartbeat
from splitveil.serving.publishing import ServedAdapter, publish_adapter
from splitveil.serving.server import DEFAULT_SESSIONS, Server
from splitveil.serving.tls import ServerTLS

log = logging.getLogger(__name__)

Folders = Mapping[str, str | PathLike[str]]


def serve(
    adapters: Folders,
    listen: str = "127.0.0.1:7433",
    *,
    noise: float = 0.0,
    engine: str = "lattice",
    sessions: int = DEFAULT_SESSIONS,
    ledger: str | None = None,
    limit: int | None = None,
    tls: ServerTLS | None = None,
    allow_plaintext: bool = False,
    metrics: str | None = None,
    log_identities: bool = False,
    gauge_key: str | PathLike[str] | None = None,
) -> Server:
    """Starts a server for PEFT adapter folders and returns it; use it as a context manager, or call ``close()``.

    ``adapters`` maps the names that clients ask for to folders, ``noise`` is the fraction δ of a typical answer that is
    added as noise (0.01 = 1 %; 0 leaves the floor that the protocol needs), ``sessions`` the number of clients at once.
    The weights stay in this process; what clients receive is the publication.

    With ``ledger`` (a database's URL) or ``limit`` (rows that a client is ever answered at a layer), clients show an
    API key that ``splitveil keys`` made, and their rows are counted there before they are answered. ``limit`` alone
    takes the default ledger. Without both, whoever reaches the address is answered, and nothing is counted; that is
    warned of at every start, and so is a limit at which the best attack that is known has learned a layer.

    ``tls`` is needed to listen beyond this machine, unless ``allow_plaintext`` says that something else protects the
    way. ``metrics`` ("host:port") serves figures for Prometheus; ``log_identities`` lets the log name clients.
    ``gauge_key`` is a file that is kept from start to start, by default in the user's state folder, and made where
    there is none: without it, hundreds of starts would give away singular values of the weights.

    Raises ``AdapterError`` for a folder that cannot be served, ``DataError`` for one with directions that were measured
    of other weights, ``ConfigurationError`` for an address, a certificate,
    the noise, the limit, the gauge key, the ledger, or one adapter under two names where rows are counted.
    """
    counted = ledger is not None or limit is not None
    for name in adapters:
        check_adapter_name(name)
    gauge = read_gauge_key(gauge_key)
    published: dict[str, ServedAdapter] = {}
    for name, folder in adapters.items():
        loaded = load_adapter(Path(folder))
        if counted:
            _require_one_name(published, name, loaded.digest)
        published[name] = _published(loaded, noise, engine, gauge)
    start = partial(
        Server,
        published,
        listen,
        sessions=sessions,
        tls=tls,
        allow_plaintext=allow_plaintext,
        metrics=metrics,
        log_identities=log_identities,
    )
    if not counted:
        server = start()
        log.warning(
            "neither a ledger nor a limit was given: no client is known, no row is counted, and whoever asks for as "
            "many as a layer has inputs can rebuild it",
            extra={"event": "rows_not_counted"},
        )
        return server
    served = dict(published)
    resources = ExitStack()
    try:
        database = resources.enter_context(Database(locate(ledger)))
        gate = metered(published, database, limit)
        clock = Clock(database)
        resources.enter_context(Heartbeat(clock))

        def replaced(name: str, adapter: ServedAdapter) -> None:
            _require_one_name(served, name, adapter.source)
            gate.declare(name, sites(adapter, limit))
            served[name] = adapter

        keys = Keyring(database, clock=clock)
        server = start(gate=gate, keys=keys, on_replace=replaced, on_close=resources.close)
    except BaseException:
        resources.close()
        raise
    for name, adapter in published.items():
        _warn_of_limit(name, adapter, limit)
        _warn_of_directions(name, adapter)
    return server


def reload(
    server: Server,
    adapters: Folders,
    *,
    noise: float = 0.0,
    engine: str = "lattice",
    gauge_key: str | PathLike[str] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Reads folders and certificates again, and publishes what has changed afresh; stops between two once ``stop()``.

    What does not load leaves what is served as it is, and is logged. A folder that holds what it held is not published
    again: renewing a certificate should not end anybody's session.
    """
    server.renew_certificate()
    for name, folder in adapters.items():
        if stop():
            return
        try:
            loaded = load_adapter(Path(folder))
            if (loaded.digest, read_directions_file(loaded)) != server.source(name):
                server.replace(name, _published(loaded, noise, engine, read_gauge_key(gauge_key)))
        except SplitveilError as error:
            server.not_replaced(name, error)


def _published(loaded: Adapter, noise: float, engine: str, gauge: bytes | None) -> ServedAdapter:
    """Raises ``DataError`` where directions were measured of other weights than these."""
    directions = read_directions_file(loaded)
    adapter = publish_adapter(loaded, noise=noise, engine=engine, gauge_key=gauge)
    if directions is not None:
        check_directions(loaded, directions, adapter.publication)
    return replace(adapter, directions=directions)


def metered(published: Mapping[str, ServedAdapter], database: Database, limit: int | None) -> LedgerGate:
    """A gate that counts the rows of every layer of these adapters, and answers at most ``limit`` of each."""
    gate = LedgerGate(database)
    for name, adapter in published.items():
        gate.declare(name, sites(adapter, limit))
    return gate


def sites(adapter: ServedAdapter, limit: int | None) -> Mapping[str, Site]:
    """The layers of an adapter as the ledger knows them, with what the leakage function needs of each."""
    return sites_of(adapter, limit)


def _require_one_name(served: Mapping[str, ServedAdapter], name: str, source: str) -> None:
    """Raises ``ConfigurationError`` if the folder of this digest is served under another name than ``name``."""
    for other, adapter in served.items():
        if other != name and source and adapter.source == source:
            raise ConfigurationError(
                f"{other!r} and {name!r} are one adapter, and rows are counted by name: every client would have two "
                "budgets for the same weights; serve it under one name"
            )


def _warn_of_directions(name: str, adapter: ServedAdapter) -> None:
    """Warns where the ledger's error will be that of an attacker without the base model."""
    if adapter.directions is None and adapter.publication.engine == "lattice":
        log.warning(
            "nothing was measured of adapter %s's directions: the error that `splitveil keys list` says is that of an "
            "attacker without the public base model, too large for one who has it; measure with `splitveil extract "
            "--directions`",
            name,
            extra={"event": "directions_not_measured"},
        )


def _warn_of_limit(name: str, adapter: ServedAdapter, limit: int | None) -> None:
    """Warns of a limit within which a client can learn a layer."""
    if limit is not None and limit >= (rows := rows_until_learned(adapter)):
        log.warning(
            "a limit of %d rows does not protect adapter %s: after %d its narrowest layer counts as learned, within "
            "10 %% by the best attack that is known or asked for as many rows as it has inputs; choose a lower one",
            limit,
            name,
            rows,
            extra={"event": "limit_too_high"},
        )
