"""The tables. Leases, keys and revocations are appended and never changed; what remains of a budget is derived.

Times are whole seconds since 1970 (UTC).
"""

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)

VERSION = 2
"""Of the tables. A store of version 1 is brought up to this one when it is opened, any other is refused."""

_Id = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows by itself only where the type is INTEGER

metadata = MetaData()

state = Table(
    "splitveil_state",
    metadata,
    Column("id", Integer, CheckConstraint("id = 1"), primary_key=True, autoincrement=False),
    Column("version", Integer, nullable=False),
    # The one cell that changes, and it only grows: the largest time that any server has seen.
    Column("latest", BigInteger, nullable=False),
)

accounts = Table(
    "splitveil_accounts",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("identity", Text, nullable=False),
    Column("adapter", Text, nullable=False),
    Column("site", Text, nullable=False),
    UniqueConstraint("identity", "adapter", "site"),
)

# What servers declared of their layers, appended whenever that changes. The newest of a site is in force.
sites = Table(
    "splitveil_sites",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("adapter", Text, nullable=False),
    Column("site", Text, nullable=False),
    Column("width", BigInteger, nullable=False),
    Column("noise", Double, nullable=False),
    Column("row_limit", BigInteger),  # NULL: no limit
    Column("facts", Text, nullable=False),  # for the leakage function; empty where there are none
    Column("time", BigInteger, nullable=False),
)
Index("splitveil_sites_site", sites.c.adapter, sites.c.site)

# A lease carries the running total, as a bank statement does. The primary key admits one successor to every lease, so
# two servers cannot both build on the same total, whatever they believe about locks.
leases = Table(
    "splitveil_leases",
    metadata,
    Column("account", _Id, ForeignKey(accounts.c.id), primary_key=True),
    Column("number", BigInteger, CheckConstraint("number > 0"), primary_key=True, autoincrement=False),
    Column("rows", BigInteger, CheckConstraint("rows > 0"), nullable=False),
    Column("spent", BigInteger, nullable=False),
    Column("width", BigInteger, nullable=False),
    Column("noise", Double, nullable=False),
    Column("time", BigInteger, nullable=False),
    Column("declared", _Id, ForeignKey(sites.c.id)),  # NULL: written by version 1, which declared nothing
    CheckConstraint("spent >= rows"),
)

keys = Table(
    "splitveil_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    Column("adapters", JSON(none_as_null=True)),  # NULL: every adapter
    Column("created", BigInteger, nullable=False),
    Column("expires", BigInteger),  # NULL: never
)
Index("splitveil_keys_name", keys.c.name)

revocations = Table(
    "splitveil_revocations",
    metadata,
    Column("key", Text, ForeignKey(keys.c.id), primary_key=True),
    Column("time", BigInteger, nullable=False),
)
