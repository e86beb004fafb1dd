"""One database: opened, its tables made, and transactions on it whose failure refuses instead of granting."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any

from sqlalchemy import Connection, insert, select, text, update
from sqlalchemy.exc import SQLAlchemyError

from splitveil.errors import ConfigurationError, RefusedError
from splitveil.metering.forking import watch
from splitveil.metering.storage import schema
from splitveil.metering.storage.engines import IMMEDIATE, postgresql_engine, sqlite_engine
from splitveil.metering.storage.location import parse, shown

log = logging.getLogger(__name__)

_SETUP_LOCK = 0x53706C6974  # an arbitrary number that servers creating the tables at once agree on
_INHERITED: list[Any] = []


class Database:
    """A ledger's database; a context manager. ``url`` is ``sqlite:///file`` or ``postgresql+psycopg://…``.

    Usable from many threads, and anew in a forked process. Raises ``ConfigurationError`` for a URL or a database that
    cannot be used.
    """

    def __init__(self, url: str, *, journal: str | None = None) -> None:
        where = parse(url)
        self.is_sqlite = where.drivername.startswith("sqlite")
        self._engine = sqlite_engine(where, journal) if self.is_sqlite else postgresql_engine(where)
        self._immediate = self._engine.execution_options(**{IMMEDIATE: True})
        # SQLite has one writer at a time; threads that queue here do not poll the file for their turn.
        self._writer = threading.Lock() if self.is_sqlite else nullcontext()
        self._errors = (SQLAlchemyError, self._engine.dialect.import_dbapi().Error)
        self.shown = shown(where)
        try:
            self._create()
        except self._errors as error:
            self._engine.dispose()
            raise ConfigurationError(f"the ledger {self.shown} cannot be opened: {_reason(error)}") from None
        watch(self)

    def __repr__(self) -> str:
        return f"Database({self.shown})"

    def _create(self) -> None:
        with self._writer, self._immediate.begin() as connection:
            if not self.is_sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _SETUP_LOCK})
            schema.metadata.create_all(connection)
            version = connection.execute(select(schema.state.c.version)).scalar()
            if version is None:
                connection.execute(insert(schema.state).values(id=1, version=schema.VERSION, latest=0))
            elif version == 1:
                self._upgrade(connection)
            elif version != schema.VERSION:
                raise ConfigurationError(
                    f"the ledger {self.shown} has tables of version {version}, this program writes {schema.VERSION}"
                )

    def _upgrade(self, connection: Connection) -> None:
        """From version 1, whose leases do not say what was declared. Servers of version 1 that are running go on."""
        kind = "INTEGER" if self.is_sqlite else "BIGINT"
        column = f"declared {kind} REFERENCES {schema.sites.name} (id)"
        connection.execute(text(f"ALTER TABLE {schema.leases.name} ADD COLUMN {column}"))
        connection.execute(update(schema.state).values(version=schema.VERSION))
        log.warning("the ledger %s was brought from version 1 to %d", self.shown, schema.VERSION)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads. Raises ``RefusedError`` if the database fails."""
        with self._refusing(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that is on disk when the block has ended. Raises ``RefusedError`` if the database fails.

        Whether a transaction whose commit failed was kept is then unknown: nothing may be granted for it.
        """
        with self._refusing(), self._writer, self._immediate.begin() as connection:
            yield connection

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            # The client learns that it is refused, the operator why; a URL or a password is in neither.
            log.error("the ledger failed: %s", _reason(error))
            raise RefusedError("the server cannot use its ledger just now; try again later") from None

    def close(self) -> None:
        """Closes all idle connections; safe to call twice."""
        self._engine.dispose()

    def __enter__(self) -> "Database":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def forked(self) -> None:
        """The parent's connections are neither used nor closed here: closing them would speak in the parent's name."""
        _INHERITED.append(self._engine.pool)
        self._engine.dispose(close=False)
        if self.is_sqlite:
            self._writer = threading.Lock()


def _reason(error: BaseException) -> str:
    """One line; the driver's own words without statement and parameters."""
    cause = getattr(error, "orig", None) or error
    lines = str(cause).strip().splitlines()
    return lines[0] if lines else type(cause).__name__
