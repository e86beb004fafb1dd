"""Which database holds the ledger: a URL, checked, or the default file of this user."""

import os
from pathlib import Path

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from splitveil.errors import ConfigurationError

VARIABLE = "SPLITVEIL_LEDGER"
_EXAMPLES = "sqlite:///ledger.db or postgresql+psycopg://user@host/database"
_PASSWORDS = frozenset(
    ("password", "sslpassword", "conninfo", "oauth_client_secret", "scram_client_key", "scram_server_key")
)
"""Of what may follow the ? of a PostgreSQL URL: what is a password, or may contain one. ``passfile`` is a path."""


def default_location() -> str:
    """``$SPLITVEIL_LEDGER``, else a SQLite file below ``$XDG_STATE_HOME``, else one below ``~/.local/state``.

    Raises ``ConfigurationError`` without a home directory.
    """
    own = os.environ.get(VARIABLE)
    if own:
        return own
    try:
        folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "splitveil"
    except RuntimeError:  # a container's user without an entry in the password file
        raise ConfigurationError(f"no home directory to keep the ledger in; set {VARIABLE} to {_EXAMPLES}") from None
    return URL.create("sqlite", database=str(folder / "ledger.db")).render_as_string()


def locate(flag: str | None) -> str:
    """The ledger's URL: that of a command-line flag, else the default.

    Raises ``ConfigurationError`` for a password in the flag: every user of a machine can read its command lines.
    """
    if flag is None:
        return default_location()
    url = parse(flag)
    if url.password is not None or _PASSWORDS.intersection(key.lower() for key in url.query):
        raise ConfigurationError(
            f"--ledger contains a password, which other users of this machine can read there; "
            f"put the URL into {VARIABLE}, or the password into ~/.pgpass"
        )
    return flag


def shown(url: URL) -> str:
    """``url`` without what may be a secret: its password, and all that follows the ?."""
    return url.set(query={}).render_as_string(hide_password=True)


def parse(text: str) -> URL:
    """A URL that this package can open. Raises ``ConfigurationError``, whose message does not repeat the URL."""
    try:
        url = make_url(text)
    except ArgumentError:
        raise ConfigurationError(f"the ledger's URL cannot be read; it looks like {_EXAMPLES}") from None
    if url.drivername in ("postgresql", "postgresql+psycopg"):
        return url.set(drivername="postgresql+psycopg")
    if url.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise ConfigurationError(f"a ledger cannot be kept in {url.drivername[:40]!r}; use {_EXAMPLES}")
    if not url.database or ":memory:" in url.database or url.host or url.query:
        raise ConfigurationError(
            "the ledger's SQLite URL must name a plain file, such as sqlite:///ledger.db or sqlite:////var/lib/ledger.db"
        )
    return url.set(drivername="sqlite+pysqlite")
