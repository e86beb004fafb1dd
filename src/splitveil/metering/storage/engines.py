"""Database connections set up so that what is committed stays committed.

SQLite, embedded default: writers take the write lock at their beginning (``BEGIN IMMEDIATE``), and a commit waits for
the disk (``synchronous=EXTRA``). The journal is a write-ahead log where the library is known to be free of the
"WAL-reset" defect (https://sqlite.org/wal.html#walresetbug), by which a checkpoint that races with a writer loses
committed pages; for a ledger that would be a refund. Older libraries get the rollback journal, two disk waits slower.
"""

import os
import sqlite3
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, create_engine, event
from sqlalchemy.engine import URL, Engine

from splitveil.errors import ConfigurationError

WAIT_SECONDS = 30
"""How long a writer waits for others before it gives up, and the row is refused."""
IMMEDIATE = "splitveil_immediate"
"""Execution option of a transaction that will write."""


def safe_journal(version: tuple[int, ...] = sqlite3.sqlite_version_info) -> str:
    """ "WAL" for a SQLite with the fix of its WAL-reset defect (3.51.3, 3.50.7, 3.44.6), else "DELETE"."""
    fixed = version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45)
    return "WAL" if fixed and version[:2] != (3, 52) else "DELETE"


def sqlite_engine(url: URL, journal: str | None = None) -> Engine:
    """An engine for a file that only its owner can read; the file and its folder are created.

    ``journal`` overrides the choice of journal ("WAL" or "DELETE"), for tests. Raises ``ConfigurationError``.
    """
    path = Path(str(url.database))
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # SQLite gives its journals the same permissions
    except OSError as error:
        raise ConfigurationError(f"the ledger {path} cannot be opened for writing: {error.strerror}") from None
    engine = create_engine(
        url, connect_args={"timeout": WAIT_SECONDS, "isolation_level": None}, pool_size=8, max_overflow=24
    )
    mode = journal or safe_journal()

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _: Any) -> None:
        # Asked before it is set: setting needs the file to itself, which under load would wait for nothing.
        if connection.execute("PRAGMA journal_mode").fetchone()[0].upper() != mode:
            connection.execute(f"PRAGMA journal_mode = {mode}").fetchone()
        connection.execute("PRAGMA synchronous = EXTRA")
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        immediate = connection.get_execution_options().get(IMMEDIATE)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


def postgresql_engine(url: URL) -> Engine:
    """An engine whose commits are on disk when they return, whatever the server's default is.

    Raises ``ConfigurationError`` where psycopg is not installed.
    """
    try:
        engine = create_engine(
            url,
            # Row locks are taken first and totals read after, each statement seeing what was committed before it.
            isolation_level="READ COMMITTED",
            pool_pre_ping=True,
            pool_size=8,
            max_overflow=24,
            connect_args={"connect_timeout": WAIT_SECONDS},
        )
    except ModuleNotFoundError:
        raise ConfigurationError(
            "a PostgreSQL ledger needs psycopg, which is not installed: pip install 'splitveil[postgres]'"
        ) from None

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _: Any) -> None:
        settings = {
            "lock_timeout": f"{WAIT_SECONDS}s",
            "idle_in_transaction_session_timeout": f"{WAIT_SECONDS}s",  # a stopped server must not hold its locks
        }
        with connection.cursor() as cursor:
            for name, value in settings.items():
                cursor.execute("SELECT set_config(%s, %s, false)", (name, value))
            cursor.execute(
                "SELECT set_config('synchronous_commit', 'on', false) "
                "WHERE current_setting('synchronous_commit') = 'off'"
            )
        connection.commit()

    return engine
