"""Servers killed at any moment: no client is ever answered more than its limit, and the ledger forgets nothing."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import postgresql
import pytest
from metering_support import Opener, gate_of, statement
from metering_worker import Job, start
from sqlalchemy import text

from splitveil.errors import RefusedError
from splitveil.metering import Database
from splitveil.metering.ledger import LEASES_A_LIMIT

pytest_plugins = ("metering_fixtures",)

IDENTITIES = ("alice", "bob")
SITES = ("q", "k", "v")
LIMIT = 4000
Started = list[BaseProcess]


@pytest.fixture
def processes() -> Iterator[Started]:
    started: Started = []
    yield started
    for process in started:
        with suppress(ValueError):
            process.kill()
            process.join()


@pytest.fixture
def job(place: tuple[str, str | None], tmp_path: Path) -> Job:
    return Job(place[0], place[1], tmp_path / "answered", IDENTITIES, SITES, LIMIT)


def answered(log: Path) -> Counter[str]:
    """Identity → rows that servers answered, as they wrote them down."""
    rows: Counter[str] = Counter()
    for line in log.read_text().splitlines() if log.exists() else ():
        identity, number = line.split()
        rows[identity] += int(number)
    return rows


def assert_sound(job: Job, spent: dict[tuple[str, str], int]) -> Counter[str]:
    """Answered ≤ spent ≤ limit, for everybody everywhere. Returns the rows that were answered."""
    rows = answered(job.log)
    for (identity, site), number in spent.items():
        assert number <= job.limit, f"{identity} was leased {number} rows at {site}, past {job.limit}"
    for identity, number in rows.items():
        for site in job.sites:
            kept = spent.get((identity, site), 0)
            assert number <= kept, f"{number} rows answered to {identity} at {site}, {kept} on record"
    return rows


def wait_for_answers(job: Job, more_than: int, running: Started) -> None:
    """Until more rows than that were answered."""
    deadline = time.monotonic() + 60
    while sum(answered(job.log).values()) <= more_than and any(process.is_alive() for process in running):
        assert time.monotonic() < deadline, "the servers answer nothing"
        time.sleep(0.002)


def test_servers_killed_at_random_moments(job: Job, another: Opener, processes: Started) -> None:
    """Two servers with four clients each on one ledger, killed 24 times in all; then one that is left in peace."""
    draw = random.Random(1)
    kills = 0
    for _ in range(12):
        before = sum(answered(job.log).values())
        pair = [start(replace(job, forever=True)) for _ in range(2)]
        processes += pair
        if kills < 8:  # later ones are killed while they open the ledger, too
            wait_for_answers(job, min(before, 7000), pair)
        time.sleep(draw.uniform(0, 0.05))
        for process in pair:
            assert process.is_alive()
            os.kill(process.pid or 0, signal.SIGKILL)
            kills += 1
        for process in pair:
            process.join()
            assert process.exitcode == -signal.SIGKILL
        assert_sound(job, statement(another()))
    last = start(job)
    processes.append(last)
    last.join(60)
    assert last.exitcode == 0
    spent = statement(another())
    rows = assert_sound(job, spent)
    assert spent == {(identity, site): LIMIT for identity in IDENTITIES for site in SITES}, "budget was lost"
    # What is missing is what crashes forfeited: a lease each, and the rows of two clients on their way.
    forfeited = kills * (LIMIT // LEASES_A_LIMIT + 2 * job.most_rows)
    for identity in IDENTITIES:
        assert LIMIT - forfeited <= rows[identity] <= LIMIT


def test_a_server_killed_at_every_database_event(job: Job, another: Opener, processes: Started) -> None:
    """One client; the server dies before every statement and commit of its first leases, and after their commit."""
    single = replace(job, identities=("alice",), threads=1, limit=256, most_rows=1)
    opening = [replace(single, die_opening=number) for number in range(1, 20, 4)]
    leasing = [replace(single, die_leasing=number) for number in range(1, 16)]
    for deadly in opening + leasing:
        process = start(deadly)
        processes.append(process)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, deadly
        assert_sound(single, statement(another()))
    last = start(single)
    processes.append(last)
    last.join(60)
    assert last.exitcode == 0
    spent = statement(another())
    rows = assert_sound(single, spent)
    assert set(spent.values()) == {256}
    assert 0 < rows["alice"] <= 256


def test_a_server_that_answers_before_it_reserves_is_caught(job: Job, another: Opener, processes: Started) -> None:
    """The check of these tests fails where it should."""
    process = start(replace(job, late=True, threads=1))
    processes.append(process)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(AssertionError, match="on record"):
        assert_sound(job, statement(another()))


def test_postgresql_itself_crashes(pg_cluster: postgresql.Cluster, tmp_path: Path, processes: Started) -> None:
    """Whatever was answered before the crash is on record after it; while it is down, nothing is answered."""
    url = pg_cluster.new_url()
    job = Job(url, None, tmp_path / "answered", IDENTITIES, SITES, 10**9, threads=4, forever=True)
    with Database(url) as database:
        gate = gate_of(database, 1000)
        gate.reserve("carol", "clinic", "q", 1)
        for _ in range(3):
            before = sum(answered(job.log).values())
            running = [start(job)]
            processes += running
            wait_for_answers(job, before + 500, running)
            pg_cluster.stop("immediate")
            try:
                gate.reserve("carol", "clinic", "q", 1)  # of the lease at hand
                with pytest.raises(RefusedError, match="cannot use its ledger"):
                    gate.reserve("carol", "clinic", "q", 500)
            finally:
                pg_cluster.start()
            running[0].kill()
            running[0].join()
            assert_sound(job, statement(database))
        gate.reserve("carol", "clinic", "q", 500)
        with database.read() as connection:
            assert connection.execute(text("SHOW synchronous_commit")).scalar() == "on"
