"""Answers a second of a metered server under many clients at once, and whether the ledger has every one of them.

    PYTHONPATH=tests python benchmarks/metered.py --clients 32

Every client is a gRPC session of its own with a key of its own, and asks for one row at one layer after another, the
next when the last was answered, until it has had ``--limit`` rows of every layer; then for one more of each. Queries
have the size of real ones and hold zeros, which costs the server the same. All clients are threads of one process on
the server's machine and take their part of its time: the figures compare servers, and are no server's best.

The lower the limit, the shorter the leases (a sixteenth of it, at most), and the more often one waits for the disk.
"""

import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from splitveil.bench.decode import served
from splitveil.errors import BudgetExceededError
from splitveil.metering import Database, Keyring, accounts
from splitveil.metering.storage.engines import safe_journal
from splitveil.serving.session import Session

Place = tuple[str, str]
"""Client and layer."""


@dataclass
class Round:
    """What the clients of one server saw."""

    clients: int
    seconds: float = 0.0
    answered: Counter[Place] = field(default_factory=Counter)
    """Rows."""
    waited: list[float] = field(default_factory=list)
    """Seconds, one an answer."""
    refused: int = 0
    """Of the queries past the limit."""


def compare(adapter: Path, urls: Mapping[str, str | None], clients: int, limit: int, rounds: int) -> None:
    """Runs the rounds, the servers in turn, and prints the table. ``RuntimeError`` if the ledger does not agree."""
    found: dict[str, list[Round]] = {name: [] for name in urls}
    with ExitStack() as stack:
        addresses = {}
        for name, url in urls.items():
            counted = [] if url is None else ["--ledger", url, "--limit", str(limit)]
            addresses[name] = stack.enter_context(served(adapter, "--sessions", str(clients), *counted))
        for number in range(rounds):
            for name, url in urls.items():
                names = [f"client {number}.{client}" for client in range(clients)]
                seen = asked(addresses[name], keys_of(url, names), limit, past=url is not None)
                if url is not None:
                    check(seen, url, limit)
                found[name].append(seen)
    report(found, limit)


def keys_of(url: str | None, names: list[str]) -> dict[str, str]:
    """Client to key; empty where none is asked for."""
    if url is None:
        return dict.fromkeys(names, "")
    with Database(url) as database:
        keyring = Keyring(database)
        return {name: keyring.create(name)[0] for name in names}


def asked(address: str, keys: Mapping[str, str], limit: int, *, past: bool) -> Round:
    """One round: all clients at once, each up to ``limit`` rows a layer, and with ``past`` one more."""
    seen, lock, failures = Round(len(keys)), threading.Lock(), list[BaseException]()
    together = threading.Barrier(len(keys) + 1)

    def client(name: str, key: str) -> None:
        session = None
        try:
            session = Session(address, "bench", key=key)
            layers = session.publication.layers
            width = session.publication.parameters.query_width
            data = [bytes(4 * width(layer.width)) for layer in layers]
            answered: Counter[Place] = Counter()
            waited = []
            together.wait()
            for _ in range(limit):
                for index, layer in enumerate(layers):
                    begun = time.perf_counter()
                    session.result(session.submit([index], 1, data[index]))
                    waited.append(time.perf_counter() - begun)
                    answered[name, layer.outputs[0][0]] += 1
            together.wait()
            refused = 0
            for index, layer in enumerate(layers) if past else ():
                try:
                    session.result(session.submit([index], 1, data[index]))
                    answered[name, layer.outputs[0][0]] += 1
                except BudgetExceededError:
                    refused += 1
            with lock:
                seen.answered += answered
                seen.waited += waited
                seen.refused += refused
        except BaseException as error:
            failures.append(error)
            together.abort()
            raise
        finally:
            if session is not None:
                session.close()

    threads = [threading.Thread(target=client, args=pair, daemon=True) for pair in keys.items()]
    for thread in threads:
        thread.start()
    try:
        together.wait()
        begun = time.perf_counter()
        together.wait()
        seen.seconds = time.perf_counter() - begun
    except threading.BrokenBarrierError:
        raise RuntimeError(f"a client failed: {failures[0]}") from None
    for thread in threads:
        thread.join()
    return seen


def check(seen: Round, url: str, limit: int) -> None:
    """Every answer is on record, none is past the limit, and what is on record was answered: nobody crashed."""
    with Database(url) as database:
        record = {(one.identity, one.site): one.rows for one in accounts(database)}
    for place, rows in seen.answered.items():
        if not rows == record[place] == limit:
            raise RuntimeError(f"{place}: {rows} rows were answered, {record[place]} are on record of {limit}")
    if seen.refused != len(seen.answered):
        raise RuntimeError(f"{seen.refused} of {len(seen.answered)} queries past the limit were refused")


def report(found: Mapping[str, list[Round]], limit: int) -> None:
    """The table."""
    first = found["no ledger"]
    print(f"\n{first[0].clients} sessions at once, {limit} rows a client and layer, {len(first)} rounds; ", end="")
    print(f"SQLite {sqlite3.sqlite_version} with the journal {safe_journal()}\n")
    print("| | answers a second, median (rounds) | ÷ no ledger | ms an answer, median (90 %) | answered = on record |")
    print("|---|---|---|---|---|")
    for name, rounds in found.items():
        rates = [one.answered.total() / one.seconds for one in rounds]
        # Ratios within a round: what slows the machine for a while slows all of its servers.
        ratios = [rate * base.seconds / base.answered.total() for rate, base in zip(rates, first, strict=True)]
        middle, slow = 1e3 * np.quantile([seconds for one in rounds for seconds in one.waited], [0.5, 0.9])
        total = sum(one.answered.total() for one in rounds)
        refused = sum(one.refused for one in rounds)
        counted = f"all {total:,}; {refused:,} more refused" if refused else f"{total:,}, not counted"
        print(
            f"| {name} | {np.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f}) | {np.median(ratios):.3f} | "
            f"{middle:.1f} ({slow:.1f}) | {counted} |"
        )
