"""``serve``: adapter folders to a running server."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from splitveil.adapters import load_adapter
from splitveil.serving.publishing import publish_adapter
from splitveil.serving.server import DEFAULT_SESSIONS, Server, check_adapter_name


def serve(
    adapters: Mapping[str, str | PathLike[str]],
    listen: str = "127.0.0.1:7433",
    *,
    noise: float = 0.0,
    engine: str = "lattice",
    sessions: int = DEFAULT_SESSIONS,
) -> Server:
    """Starts a server for PEFT adapter folders and returns it; use it as a context manager, or call ``close()``.

    ``adapters`` maps the names that clients ask for to folders, ``noise`` is the fraction δ of a typical answer that is
    added as noise (0.01 = 1 %; 0 leaves the floor that the protocol needs), ``sessions`` the number of clients at once.
    The weights stay in this process; what clients receive is the publication.

    Raises ``AdapterError`` for a folder that cannot be served, ``ConfigurationError`` for the address or the noise.
    """
    for name in adapters:
        check_adapter_name(name)
    published = {
        name: publish_adapter(load_adapter(Path(folder)), noise=noise, engine=engine)
        for name, folder in adapters.items()
    }
    return Server(published, listen, sessions=sessions)
