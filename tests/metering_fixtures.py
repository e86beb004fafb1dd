"""Empty ledgers on every kind of database; a pytest plugin."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import postgresql
import pytest
from metering_support import Opener

from splitveil.metering import Database

KINDS = ("sqlite", "sqlite-wal", "postgresql")


@pytest.fixture(scope="session")
def pg_cluster() -> Iterator[postgresql.Cluster]:
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    if postgresql.programs() is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    with postgresql.cluster() as running:
        yield running


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def place(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[str, str | None]:
    """(URL of an empty ledger, journal) for every kind of database."""
    if kind == "postgresql":
        return request.getfixturevalue("pg_cluster").new_url(), None
    return f"sqlite:///{tmp_path / 'ledger.db'}", {"sqlite": "DELETE", "sqlite-wal": "WAL"}[kind]


@pytest.fixture
def another(place: tuple[str, str | None]) -> Iterator[Opener]:
    """Opens the ledger, as one more server does."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(Database(place[0], journal=place[1]))


@pytest.fixture
def database(another: Opener) -> Database:
    return another()
