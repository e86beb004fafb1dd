"""Thirty-two clients against one ledger: no row past the limit, none lost."""

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from metering_support import Opener, gate_of, statement
from metering_worker import Job, start

from splitveil.errors import BudgetExceededError
from splitveil.metering import LedgerGate

pytest_plugins = ("metering_fixtures",)

CLIENTS = 32


def in_threads(work: Callable[[int], None]) -> None:
    """``work(0)`` … ``work(31)`` at once; an error in any is raised."""
    together = threading.Barrier(CLIENTS)

    def run(number: int) -> None:
        together.wait()
        work(number)

    with ThreadPoolExecutor(CLIENTS) as threads:
        list(threads.map(run, range(CLIENTS)))


@pytest.mark.parametrize("servers", [1, 4])
def test_threads_of_one_identity(another: Opener, servers: int) -> None:
    gates = [gate_of(another(), 2000, "q", "k", "v") for _ in range(servers)]
    allowed: Counter[int] = Counter()

    def client(number: int) -> None:
        order = ["q", "k", "v"] if number % 2 else ["v", "k", "q"]
        while True:
            try:
                gates[number % servers].reserve_all("alice", "clinic", order, 1)
            except BudgetExceededError:
                return
            allowed[number] += 1

    in_threads(client)
    assert sum(allowed.values()) == 2000
    assert statement(another()) == {("alice", site): 2000 for site in ("q", "k", "v")}


def test_nobody_is_refused_while_there_is_budget(another: Opener) -> None:
    """Together the clients ask for exactly the limit."""
    gate = gate_of(another(), CLIENTS * 64, "q", "k")

    def client(number: int) -> None:
        for _ in range(32):
            gate.reserve_all("alice", "clinic", ["q", "k"] if number % 2 else ["k", "q"], 2)

    in_threads(client)
    with pytest.raises(BudgetExceededError):
        gate.reserve("alice", "clinic", "q", 1)


def test_threads_of_many_identities(another: Opener) -> None:
    gate: LedgerGate = gate_of(another(), 5, "q", "k")
    allowed: Counter[str] = Counter()

    def client(number: int) -> None:
        name = f"client {number}"
        while True:
            try:
                gate.reserve_all(name, "clinic", ["q", "k"], 1)
            except BudgetExceededError:
                return
            allowed[name] += 1

    in_threads(client)
    assert allowed == {f"client {number}": 5 for number in range(CLIENTS)}


def test_servers_in_processes_of_their_own(place: tuple[str, str | None], another: Opener, tmp_path: Path) -> None:
    """Four servers with eight clients each."""
    job = Job(place[0], place[1], tmp_path / "answered", ("alice", "bob"), ("q", "k"), 3000, threads=8)
    processes = [start(job) for _ in range(4)]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    rows: Counter[str] = Counter()
    for line in job.log.read_text().splitlines():
        identity, number = line.split()
        rows[identity] += int(number)
    assert rows == {"alice": 3000, "bob": 3000}
    assert set(statement(another()).values()) == {3000}
