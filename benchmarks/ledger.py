"""What the ledger costs: microseconds a reservation and reservations a second, on SQLite and PostgreSQL.

    PYTHONPATH=tests python benchmarks/ledger.py                  PostgreSQL in a temporary folder, where installed
    python benchmarks/ledger.py --url postgresql+psycopg://…      that database instead (its tables are created)

A token is one row at each of 24 layers, one reservation for every layer, as a server makes them. Databases are in a
folder that is removed at the end; --folder says where, for the disk makes the difference.
"""

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from splitveil.metering import Database, LedgerGate, Site
from splitveil.metering.storage.engines import safe_journal

LAYERS = 24
CLIENTS = 32
ADAPTER = "clinic"
MODULES = [f"layers.{number}.q_proj" for number in range(LAYERS)]
Reserve = Callable[[str, str, str, int], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="A PostgreSQL to use instead of one of our own.")
    parser.add_argument("--folder", type=Path, help="Where SQLite's files go; the default is the temporary folder.")
    parser.add_argument("--seconds", type=float, default=3.0, help="For every figure.")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; SQLite here gets the journal {safe_journal()}")
    headings = ("", "hit, µs", "miss, ms", "24 misses, ms", "token, µs", "tokens/s × 1", f"tokens/s × {CLIENTS}")
    print("".join(f"{heading:>15}" for heading in headings))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder)))
        report("no ledger", None, options.seconds)
        for journal in ("DELETE", "WAL"):
            with Database(f"sqlite:///{folder / journal}.db", journal=journal) as database:
                report(f"SQLite {journal}", database, options.seconds)
        url = options.url or stack.enter_context(own_postgresql())
        if url is not None:
            with Database(url) as database:
                report("PostgreSQL", database, options.seconds)


@contextmanager
def own_postgresql() -> Iterator[str | None]:
    """The URL of a PostgreSQL that runs as long as the block, or None."""
    try:
        from postgresql import cluster
    except ModuleNotFoundError:
        print("no PostgreSQL: run with PYTHONPATH=tests or with --url", file=sys.stderr)
        yield None
        return
    with cluster() as running:
        yield running.new_url()


def report(name: str, database: Database | None, seconds: float) -> None:
    """One line of figures."""
    reserve = gate_of(database)
    hit = hits(reserve, seconds)
    if database is None:
        one_miss = all_misses = float("nan")
    else:
        one_miss = misses(reserve, seconds)
        all_misses = batched_misses(database, seconds)
    alone = tokens(reserve, 1, seconds)
    many = tokens(reserve, CLIENTS, seconds)
    figures = (f"{hit * 1e6:.2f}", f"{one_miss * 1e3:.2f}", f"{all_misses * 1e3:.2f}", f"{1e6 / alone:.0f}")
    print(
        f"{name:>15}" + "".join(f"{figure:>15}" for figure in (*figures, f"{alone:,.0f}", f"{many:,.0f}")), flush=True
    )


def gate_of(database: Database | None) -> Reserve:
    """``reserve`` of a ledger without a limit, or of nothing."""
    if database is None:
        return nothing
    gate = LedgerGate(database)
    gate.declare(ADAPTER, {module: Site(896, 0.0, None) for module in MODULES})
    return gate.reserve


def nothing(identity: str, adapter: str, module: str, rows: int) -> None:
    """Allows."""


def hits(reserve: Reserve, seconds: float) -> float:
    """Median seconds of a reservation of one row, nearly all of which find their lease."""
    return median(lambda: reserve("hit", ADAPTER, MODULES[0], 1), seconds)


def misses(reserve: Reserve, seconds: float) -> float:
    """Median seconds of a reservation that takes a lease, of one layer."""
    return median(lambda: reserve("miss", ADAPTER, MODULES[0], 100_000), seconds)


def batched_misses(database: Database, seconds: float) -> float:
    """Median seconds of a reservation that takes leases for all 24 layers."""
    gate = LedgerGate(database)
    gate.declare(ADAPTER, {module: Site(896, 0.0, None) for module in MODULES})
    return median(lambda: gate.reserve_all("batch", ADAPTER, MODULES, 100_000), seconds)


def median(work: Callable[[], None], seconds: float) -> float:
    """Median seconds of ``work``, after one call that opens accounts."""
    work()
    taken = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def tokens(reserve: Reserve, clients: int, seconds: float) -> float:
    """Tokens a second of so many clients, each with an identity of its own; renewals of leases included."""
    counts = [0] * clients
    begin = threading.Barrier(clients + 1)
    stop = threading.Event()

    def client(number: int) -> None:
        for module in MODULES:
            reserve(f"client {number}", ADAPTER, module, 1)
        begin.wait()
        while not stop.is_set():
            for module in MODULES:
                reserve(f"client {number}", ADAPTER, module, 1)
            counts[number] += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    begin.wait()
    begun = time.perf_counter()
    time.sleep(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - begun)


if __name__ == "__main__":
    main()
