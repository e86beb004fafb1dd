"""A PostgreSQL cluster of the tests' own: in a temporary folder, over a Unix socket, gone at the end."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from urllib.parse import quote

USER = "postgres"
_numbers = count(1)


def programs() -> Path | None:
    """The folder of initdb and pg_ctl (Debian keeps them off the PATH), or None where PostgreSQL is not installed."""
    on_path = shutil.which("pg_ctl")
    folders = [Path(on_path).resolve().parent] if on_path else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").exists() and (folder / "pg_ctl").exists()), None)


@dataclass(frozen=True)
class Cluster:
    """A running cluster; ``folder`` holds its data and its socket."""

    folder: Path
    programs: Path

    def run(self, program: str, *arguments: str) -> None:
        """Runs one of PostgreSQL's programs; as the user postgres if we are root, whom PostgreSQL refuses."""
        become = ["runuser", "-u", USER, "--"] if os.geteuid() == 0 else []
        command = [*become, str(self.programs / program), "-D", str(self.folder / "data"), *arguments]
        with (self.folder / "log").open("ab") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, cwd=self.folder, timeout=120)

    def start(self) -> None:
        """Starts it, with its durable defaults."""
        self.run("pg_ctl", "start", "-w", "-o", f"-c listen_addresses='' -c unix_socket_directories='{self.folder}'")

    def stop(self, mode: str) -> None:
        """Stops it: "fast", or "immediate", which is a crash."""
        self.run("pg_ctl", "stop", "-w", "-m", mode)

    def new_url(self) -> str:
        """The URL of a schema without tables."""
        import psycopg

        name = f"ledger_{next(_numbers)}"
        with psycopg.connect(host=str(self.folder), user=USER, dbname="postgres", autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {name}")
        options = quote(f"-csearch_path={name}")
        return f"postgresql+psycopg://{USER}@/postgres?host={quote(str(self.folder), safe='')}&options={options}"


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A running cluster. Raises ``FileNotFoundError`` where PostgreSQL is not installed."""
    found = programs()
    if found is None:
        raise FileNotFoundError("PostgreSQL's initdb and pg_ctl are not installed (Debian: apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # short: a socket's path has at most 107 characters
    try:
        (folder / "log").touch()
        if os.geteuid() == 0:
            shutil.chown(folder, USER)
        made = Cluster(folder, found)
        made.run("initdb", "--no-sync", "--username", USER, "--auth", "trust", "--encoding", "UTF8")
        made.start()
        try:
            yield made
        finally:
            made.stop("immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
