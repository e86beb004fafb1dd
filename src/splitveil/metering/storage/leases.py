"""Leases: how many rows were set aside, for whom; appended, all of a query's or none."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, and_, func, insert, select, tuple_
from sqlalchemy.dialects import postgresql, sqlite

from splitveil.metering.storage.database import Database
from splitveil.metering.storage.schema import accounts, leases

Name = tuple[str, str, str]
"""Identity, adapter, site: what an account is called."""


@dataclass(frozen=True)
class Claim:
    """What is asked of an account: at least ``needed`` rows, up to ``wanted``, none beyond ``limit`` (None: no limit).

    0 needed: what can be had is welcome. ``width`` and ``noise`` are those of the layer that will answer, ``declared``
    is the number of its declaration, if it was declared; all are recorded with the lease.
    """

    name: Name
    needed: int
    wanted: int
    limit: int | None
    width: int
    noise: float
    declared: int | None = None


@dataclass(frozen=True)
class Grant:
    """Rows leased, and the account's total with them; of a refused claim ``rows`` is less than was needed."""

    rows: int
    spent: int


@dataclass
class Leases:
    """The leases of one database."""

    database: Database
    _ids: dict[Name, int] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.Lock)

    def append(self, claims: Sequence[Claim], time: int) -> tuple[bool, list[Grant]]:
        """(True, leases for all claims, on disk at return); or none, if one of them cannot have what it needs.

        Then it is False with 0 rows for everyone. Claims name different accounts. Raises ``RefusedError`` if the
        database fails: whether the leases were recorded is then unknown, and they must be taken for spent.
        """
        ids = self._accounts([claim.name for claim in claims])
        with self.database.write() as connection:
            last = _last(connection, ids)
            rooms = [_room(claim, last[account][1]) for claim, account in zip(claims, ids, strict=True)]
            if any(room < claim.needed for claim, room in zip(claims, rooms, strict=True)):
                return False, [Grant(0, last[account][1]) for account in ids]
            grants = [Grant(room, last[account][1] + room) for room, account in zip(rooms, ids, strict=True)]
            rows = [
                {
                    "account": account,
                    "number": last[account][0] + 1,
                    "rows": grant.rows,
                    "spent": grant.spent,
                    "width": claim.width,
                    "noise": claim.noise,
                    "time": time,
                    "declared": claim.declared,
                }
                for claim, grant, account in zip(claims, grants, ids, strict=True)
                if grant.rows
            ]
            if rows:
                connection.execute(insert(leases), rows)
        return True, grants

    def spent(self, identity: str, adapter: str) -> dict[str, int]:
        """Site → rows leased to one client at an adapter, where there are any."""
        query = (
            select(accounts.c.site, func.max(leases.c.spent).label("spent"))
            .join(leases, leases.c.account == accounts.c.id)
            .where(accounts.c.identity == identity, accounts.c.adapter == adapter)
            .group_by(accounts.c.site)
        )
        with self.database.read() as connection:
            return {row.site: row.spent for row in connection.execute(query)}

    def totals(self) -> Sequence[Any]:
        """One row an account: identity, adapter, site, rows leased, least width and least noise among its leases."""
        summary = (
            select(
                leases.c.account,
                func.max(leases.c.spent).label("spent"),
                func.min(leases.c.width).label("width"),
                func.min(leases.c.noise).label("noise"),
            )
            .group_by(leases.c.account)
            .subquery()
        )
        query = (
            select(
                accounts.c.identity,
                accounts.c.adapter,
                accounts.c.site,
                summary.c.spent,
                summary.c.width,
                summary.c.noise,
            )
            .join(summary, summary.c.account == accounts.c.id)
            .order_by(accounts.c.identity, accounts.c.adapter, accounts.c.id)
        )
        with self.database.read() as connection:
            return connection.execute(query).all()

    def _accounts(self, names: Sequence[Name]) -> list[int]:
        """The accounts' numbers; opens those that do not exist, in a transaction of its own."""
        with self._lock:
            unknown = [name for name in names if name not in self._ids]
        if unknown:
            dialect = sqlite if self.database.is_sqlite else postgresql
            columns = (accounts.c.identity, accounts.c.adapter, accounts.c.site)
            with self.database.write() as connection:
                rows = [dict(zip(("identity", "adapter", "site"), name, strict=True)) for name in sorted(unknown)]
                connection.execute(dialect.insert(accounts).values(rows).on_conflict_do_nothing())
                found = connection.execute(select(accounts.c.id, *columns).where(tuple_(*columns).in_(unknown))).all()
            with self._lock:
                self._ids |= {(row.identity, row.adapter, row.site): row.id for row in found}
        with self._lock:
            return [self._ids[name] for name in names]


def _last(connection: Connection, ids: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Account → (number, running total) of its last lease, zeros before the first; they stay so until the end."""
    # PostgreSQL: locked in the order of their numbers, so that two servers never wait for each other; and read by the
    # next statement, which sees what was committed while this one waited. SQLite has its one lock since the beginning.
    connection.execute(select(accounts.c.id).where(accounts.c.id.in_(ids)).order_by(accounts.c.id).with_for_update())
    older = leases.alias()
    newest = select(func.max(older.c.number)).where(older.c.account == accounts.c.id).correlate(accounts)
    latest = and_(leases.c.account == accounts.c.id, leases.c.number == newest.scalar_subquery())
    query = (
        select(accounts.c.id, leases.c.number, leases.c.spent)
        .select_from(accounts.outerjoin(leases, latest))
        .where(accounts.c.id.in_(ids))
    )
    return {row.id: (row.number or 0, row.spent or 0) for row in connection.execute(query)}


def _room(claim: Claim, spent: int) -> int:
    return claim.wanted if claim.limit is None else max(0, min(claim.wanted, claim.limit - spent))
