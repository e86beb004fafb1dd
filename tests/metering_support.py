"""Gates to test, and what must hold of every ledger whatever happened to it."""

from collections import Counter
from collections.abc import Callable

from sqlalchemy import select

from splitveil.metering import Database, LedgerGate, Site
from splitveil.metering.storage.schema import accounts, leases

Opener = Callable[[], Database]


def gate_of(database: Database, limit: int | None, *names: str, width: int = 4096, noise: float = 0.0) -> LedgerGate:
    """A gate that has the sites ``names`` (or "q") of the adapter "clinic"."""
    gate = LedgerGate(database)
    gate.declare("clinic", {name: Site(width, noise, limit) for name in names or ("q",)})
    return gate


def statement(database: Database) -> dict[tuple[str, str], int]:
    """(identity, site) → rows leased, added up from the leases one by one; checks that running totals agree."""
    columns = (accounts.c.identity, accounts.c.site, leases.c.number, leases.c.rows, leases.c.spent)
    query = select(*columns).join(leases, leases.c.account == accounts.c.id).order_by(accounts.c.id, leases.c.number)
    totals: Counter[tuple[str, str]] = Counter()
    numbers: Counter[tuple[str, str]] = Counter()
    with database.read() as connection:
        for identity, site, number, rows, spent in connection.execute(query):
            totals[identity, site] += rows
            numbers[identity, site] += 1
            assert number == numbers[identity, site], "a lease is missing"
            assert spent == totals[identity, site], "a running total is wrong"
    return dict(totals)
