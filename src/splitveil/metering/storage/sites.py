"""What servers declared of the layers they answer for: appended when it changes, so that accounts can be read later."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, func, insert, select

from splitveil.metering.storage.database import Database
from splitveil.metering.storage.leases import Name
from splitveil.metering.storage.schema import accounts, leases, sites

Place = tuple[str, str]
"""Adapter, site."""


@dataclass(frozen=True)
class Declared:
    """One declaration of a site; ``facts`` is text that only the leakage function reads."""

    width: int
    noise: float
    limit: int | None
    facts: str


def declare(database: Database, adapter: str, declared: Mapping[str, Declared], time: int) -> dict[str, int]:
    """Site → number of its declaration, on disk at return; a site's newest declaration is not repeated.

    Raises ``RefusedError`` if the database fails.
    """
    numbers: dict[str, int] = {}
    with database.write() as connection:
        newest = _newest(connection, adapter)
        for site, facts in declared.items():
            number, known = newest.get((adapter, site), (0, None))
            if known != facts:
                row = {
                    "adapter": adapter,
                    "site": site,
                    "width": facts.width,
                    "noise": facts.noise,
                    "row_limit": facts.limit,
                    "facts": facts.facts,
                    "time": time,
                }
                number = connection.execute(insert(sites).values(row).returning(sites.c.id)).scalar_one()
            numbers[site] = number
    return numbers


def in_force(database: Database) -> dict[Place, Declared]:
    """The newest declaration of every site. Raises ``RefusedError`` if the database fails."""
    with database.read() as connection:
        return {place: facts for place, (_, facts) in _newest(connection).items()}


def facts_of_accounts(database: Database) -> dict[Name, tuple[str, ...]]:
    """Account → the facts, without repetition, that its rows were leased under; accounts without any are left out.

    Raises ``RefusedError`` if the database fails.
    """
    names = (accounts.c.identity, accounts.c.adapter, accounts.c.site)
    query = (
        select(*names, sites.c.facts)
        .join(leases, leases.c.account == accounts.c.id)
        .join(sites, sites.c.id == leases.c.declared)
        .where(sites.c.facts != "")
        .distinct()
        .order_by(*names, sites.c.facts)
    )
    found: defaultdict[Name, tuple[str, ...]] = defaultdict(tuple)
    with database.read() as connection:
        for row in connection.execute(query):
            found[row.identity, row.adapter, row.site] += (row.facts,)
    return dict(found)


def _newest(connection: Connection, adapter: str | None = None) -> dict[Place, tuple[int, Declared]]:
    last = select(func.max(sites.c.id)).group_by(sites.c.adapter, sites.c.site)
    if adapter is not None:
        last = last.where(sites.c.adapter == adapter)
    query = select(sites).where(sites.c.id.in_(last))
    return {
        (row.adapter, row.site): (row.id, Declared(row.width, row.noise, row.row_limit, row.facts))
        for row in connection.execute(query)
    }
