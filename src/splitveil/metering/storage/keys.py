"""Keys and revocations in the database: appended, never changed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Row, Select, insert, select
from sqlalchemy.dialects import postgresql, sqlite

from splitveil.metering.storage.database import Database
from splitveil.metering.storage.schema import keys, revocations, state


@dataclass(frozen=True)
class Stored:
    """A key as it is kept: its digest, and whether it was revoked since."""

    id: str
    name: str
    digest: bytes = field(repr=False)
    adapters: tuple[str, ...] | None
    created: int
    expires: int | None
    revoked: int | None


def insert_key(database: Database, key: Stored) -> None:
    """Keeps a new key; on disk at return."""
    with database.write() as connection:
        connection.execute(
            insert(keys).values(
                id=key.id,
                name=key.name,
                digest=key.digest,
                adapters=None if key.adapters is None else list(key.adapters),
                created=key.created,
                expires=key.expires,
            )
        )


def insert_revocations(database: Database, ids: Sequence[str], time: int) -> None:
    """Revokes keys; on disk at return. The first revocation of a key stands."""
    if not ids:
        return
    dialect = sqlite if database.is_sqlite else postgresql
    with database.write() as connection:
        rows = [{"key": key, "time": time} for key in ids]
        connection.execute(dialect.insert(revocations).values(rows).on_conflict_do_nothing())


def stored_keys(database: Database) -> list[Stored]:
    """All keys, oldest first."""
    with database.read() as connection:
        return [_stored(row) for row in connection.execute(_select().order_by(keys.c.created, keys.c.id))]


def find(database: Database, id: str) -> tuple[Stored | None, int]:
    """The key of that id, if there is one, and the largest time on record."""
    with database.read() as connection:
        row = connection.execute(_select().where(keys.c.id == id)).one_or_none()
        latest = connection.execute(select(state.c.latest)).scalar_one()
    return (None if row is None else _stored(row)), latest


def _select() -> Select[Any]:
    return select(keys, revocations.c.time.label("revoked")).outerjoin(revocations, revocations.c.key == keys.c.id)


def _stored(row: Row[Any]) -> Stored:
    adapters = None if row.adapters is None else tuple(row.adapters)
    return Stored(row.id, row.name, bytes(row.digest), adapters, row.created, row.expires, row.revoked)
