"""``serve``: adapter folders to a running server."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from splitveil.adapters import load_adapter
from splitveil.metering import Database, Keyring, LedgerGate, Site, locate
from splitveil.serving.publishing import ServedAdapter, publish_adapter
from splitveil.serving.server import DEFAULT_SESSIONS, Server, check_adapter_name


def serve(
    adapters: Mapping[str, str | PathLike[str]],
    listen: str = "127.0.0.1:7433",
    *,
    noise: float = 0.0,
    engine: str = "lattice",
    sessions: int = DEFAULT_SESSIONS,
    ledger: str | None = None,
    limit: int | None = None,
) -> Server:
    """Starts a server for PEFT adapter folders and returns it; use it as a context manager, or call ``close()``.

    ``adapters`` maps the names that clients ask for to folders, ``noise`` is the fraction δ of a typical answer that is
    added as noise (0.01 = 1 %; 0 leaves the floor that the protocol needs), ``sessions`` the number of clients at once.
    The weights stay in this process; what clients receive is the publication.

    With ``ledger`` (a database's URL) or ``limit`` (rows that a client is ever answered at a layer), clients show an
    API key that ``splitveil keys`` made, and their rows are counted there before they are answered. ``limit`` alone
    takes the default ledger. Without both, whoever reaches the address is answered, and nothing is counted.

    Raises ``AdapterError`` for a folder that cannot be served, ``ConfigurationError`` for the address, the noise, the
    limit or the ledger.
    """
    for name in adapters:
        check_adapter_name(name)
    published = {
        name: publish_adapter(load_adapter(Path(folder)), noise=noise, engine=engine)
        for name, folder in adapters.items()
    }
    if ledger is None and limit is None:
        return Server(published, listen, sessions=sessions)
    database = Database(locate(ledger))
    try:
        gate = metered(published, database, limit)
        return Server(published, listen, gate=gate, keys=Keyring(database), sessions=sessions, on_close=database.close)
    except BaseException:
        database.close()
        raise


def metered(published: Mapping[str, ServedAdapter], database: Database, limit: int | None) -> LedgerGate:
    """A gate that counts the rows of every layer of these adapters, and answers at most ``limit`` of each."""
    gate = LedgerGate(database)
    for name, adapter in published.items():
        noise = adapter.publication.noise
        layers = adapter.publication.layers
        gate.declare(name, {layer.outputs[0][0]: Site(layer.width, noise, limit) for layer in layers})
    return gate
