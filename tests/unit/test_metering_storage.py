"""Where a ledger is kept, and that what is committed is durable."""

import stat
import threading
from pathlib import Path

import postgresql
import pytest
from metering_support import Opener, gate_of
from sqlalchemy import text, update

from splitveil.errors import ConfigurationError
from splitveil.metering import Database, accounts, default_location, locate
from splitveil.metering.storage import schema
from splitveil.metering.storage.engines import safe_journal

pytest_plugins = ("metering_fixtures",)


def test_the_default_is_a_file_of_this_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPLITVEIL_LEDGER", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert default_location() == f"sqlite:///{tmp_path}/state/splitveil/ledger.db"
    with Database(locate(None)) as database:
        gate_of(database, 10).reserve("alice", "clinic", "q", 1)
        folder = tmp_path / "state" / "splitveil"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_location() == f"sqlite:///{tmp_path}/.local/state/splitveil/ledger.db"
    monkeypatch.setenv("SPLITVEIL_LEDGER", "postgresql+psycopg://host/db")
    assert locate(None) == "postgresql+psycopg://host/db"
    assert locate("sqlite:///other.db") == "sqlite:///other.db"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ledger.db", "cannot be read"),
        ("", "cannot be read"),
        ("mysql://host/db", "cannot be kept in 'mysql'"),
        ("postgresql+pg8000://host/db", "cannot be kept in"),
        ("sqlite://", "must name a plain file"),
        ("sqlite:///:memory:", "must name a plain file"),
        ("sqlite:///file:x?mode=ro&uri=true", "must name a plain file"),
        ("sqlite:////proc/nowhere/ledger.db", "cannot be opened for writing"),
        ("postgresql://user@127.0.0.1:1/db", "cannot be opened"),
    ],
)
def test_places_that_hold_no_ledger(url: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        Database(url)


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").write_text("a shopping list, " * 100)
    with pytest.raises(ConfigurationError, match="file is not a database"):
        Database(f"sqlite:///{tmp_path}/ledger.db")
    assert "shopping" in (tmp_path / "ledger.db").read_text()


SECRETIVE = (
    "postgresql+psycopg://user:hunter2@127.0.0.1:1/db",
    "postgresql://user@127.0.0.1:1/db?password=hunter2",
    "postgresql://user@127.0.0.1:1/db?sslmode=prefer&PASSWORD=hunter2",
    "postgresql://user@127.0.0.1:1/db?sslpassword=hunter2",
    "postgresql://user@127.0.0.1:1/db?conninfo=password%3Dhunter2",
)


@pytest.mark.parametrize("url", SECRETIVE)
def test_passwords_are_not_taken_from_the_command_line_nor_shown(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigurationError, match=r"contains a password.*SPLITVEIL_LEDGER.*pgpass") as refused:
        locate(url)
    assert "hunter2" not in str(refused.value)
    with pytest.raises(ConfigurationError) as refused:
        Database(url)
    assert "hunter2" not in str(refused.value)
    assert refused.value.__suppress_context__
    assert "hunter2" not in "".join(capfd.readouterr())


def test_a_password_from_the_environment_is_taken_and_not_shown(
    pg_cluster: postgresql.Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SPLITVEIL_LEDGER", pg_cluster.new_url() + "&password=hunter2")
    with Database(locate(None)) as database:
        assert "hunter2" not in repr(database)
        with database.write() as connection:
            connection.execute(update(schema.state).values(version=99))
    with pytest.raises(ConfigurationError, match="tables of version 99") as refused:
        Database(locate(None))
    assert "hunter2" not in str(refused.value) + caplog.text


def test_what_is_no_password_may_follow_the_question_mark() -> None:
    for query in ("passfile=/etc/splitveil/pgpass", "sslmode=verify-full&sslrootcert=ca.pem"):
        url = f"postgresql://user@host/db?{query}"
        assert locate(url) == url


def test_tables_of_another_version_are_refused(database: Database, place: tuple[str, str | None]) -> None:
    with database.write() as connection:
        connection.execute(update(schema.state).values(version=99))
    with pytest.raises(ConfigurationError, match="tables of version 99, this program writes 2"):
        Database(place[0], journal=place[1])


def test_servers_may_create_the_tables_at_once(place: tuple[str, str | None]) -> None:
    errors: list[Exception] = []
    together = threading.Barrier(8)

    def run() -> None:
        together.wait()
        try:
            Database(place[0], journal=place[1]).close()
        except ConfigurationError as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_commits_wait_for_the_disk(database: Database, kind: str) -> None:
    with database.read() as connection:
        if kind == "postgresql":
            assert connection.execute(text("SHOW synchronous_commit")).scalar() == "on"
            assert connection.execute(text("SHOW transaction_isolation")).scalar() == "read committed"
        else:
            assert connection.execute(text("PRAGMA synchronous")).scalar() == 3  # EXTRA
            journal = connection.execute(text("PRAGMA journal_mode")).scalar()
            assert journal == {"sqlite": "delete", "sqlite-wal": "wal"}[kind]


def test_a_postgresql_that_does_not_wait_is_made_to(pg_cluster: postgresql.Cluster) -> None:
    url = pg_cluster.new_url().replace("options=", "options=-csynchronous_commit%3Doff%20")
    with Database(url) as database, database.read() as connection:
        assert connection.execute(text("SHOW synchronous_commit")).scalar() == "on"


def test_the_journal_suits_the_library() -> None:
    for version in ((3, 51, 3), (3, 53, 0), (4, 0, 0), (3, 50, 7), (3, 44, 6)):
        assert safe_journal(version) == "WAL"
    for version in ((3, 40, 1), (3, 44, 5), (3, 45, 0), (3, 50, 6), (3, 51, 2)):
        assert safe_journal(version) == "DELETE"


def test_a_ledger_changes_its_journal_when_reopened(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db"
    for journal in ("DELETE", "WAL", "DELETE"):
        with Database(url, journal=journal) as database:
            gate_of(database, None).reserve("alice", "clinic", "q", 256)
    with Database(url) as database:
        assert accounts(database)[0].rows == 3 * 256


def test_a_reader_does_not_stop_a_writer(another: Opener) -> None:
    with another().read() as connection:
        connection.execute(text("SELECT 1"))
        gate_of(another(), 10).reserve("alice", "clinic", "q", 10)
