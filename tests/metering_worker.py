"""A server's loop in a process of its own: reserves, then writes down every row that it was allowed, until refused."""

import itertools
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from sqlalchemy import event
from sqlalchemy.engine import Engine

from splitveil.errors import BudgetExceededError
from splitveil.metering import Database, LedgerGate, Site
from splitveil.metering.storage.leases import Claim, Grant, Leases

ADAPTER = "clinic"


@dataclass(frozen=True)
class Job:
    """What a worker does: ``threads`` clients a process, of ``identities``, each asking for all ``sites`` at once."""

    url: str
    journal: str | None
    log: Path
    identities: tuple[str, ...]
    sites: tuple[str, ...]
    limit: int
    threads: int = 4
    most_rows: int = 3
    die_opening: int | None = None
    """SIGKILL to itself at this database event, from the beginning."""
    die_leasing: int | None = None
    """SIGKILL to itself at this database event, once the ledger is open."""
    late: bool = False
    """A broken server: it answers first and reserves after."""
    forever: bool = False
    """Goes on asking when refused."""


def start(job: Job) -> BaseProcess:
    """The job in a new process, which inherits nothing from this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["splitveil.metering", "psycopg"])
    process = context.Process(target=run, args=(job,), daemon=True)
    process.start()
    return process


def run(job: Job) -> None:
    """The worker's process."""
    if job.die_opening is not None:
        die_at(job.die_opening)
    with Database(job.url, journal=job.journal) as database:
        gate = LedgerGate(database)
        gate.declare(ADAPTER, {site: Site(4096, 0.0, job.limit) for site in job.sites})
        if job.die_leasing is not None:
            die_at(job.die_leasing)
        log = os.open(job.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        clients = [threading.Thread(target=_client, args=(job, gate, log, number)) for number in range(job.threads)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()


def _client(job: Job, gate: LedgerGate, log: int, number: int) -> None:
    draw = random.Random(f"{os.getpid()} {number}")
    identity = job.identities[number % len(job.identities)]
    while True:
        sites = draw.sample(job.sites, len(job.sites))  # in any order: two clients must not wait for each other
        rows = draw.randint(1, job.most_rows)
        try:
            if job.late:
                os.write(log, f"{identity} {rows}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)
            gate.reserve_all(identity, ADAPTER, sites, rows)
        except BudgetExceededError:
            if rows == 1 and not job.forever:
                return
            continue
        os.write(log, f"{identity} {rows}\n".encode())  # one write to a file in append mode: whole lines, or none


def die_at(number: int) -> None:
    """Arranges for this process to be killed at its ``number``-th database event from now on: before every statement,
    before every commit, and after the commit of a lease, before a row of it is granted."""
    passed = itertools.count(1)

    def step(*_: object, **__: object) -> None:
        if next(passed) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    for name in ("before_cursor_execute", "commit", "rollback"):
        event.listen(Engine, name, step)
    append = Leases.append

    def appended(self: Leases, claims: Sequence[Claim], time: int) -> tuple[bool, list[Grant]]:
        result = append(self, claims, time)
        step()
        return result

    Leases.append = appended  # type: ignore[method-assign]
