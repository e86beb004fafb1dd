"""What the ledger says of an account: rows, and what the best attack that is known makes of so many."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from splitveil.errors import ConfigurationError
from splitveil.metering.storage.database import Database
from splitveil.metering.storage.leases import Leases
from splitveil.metering.storage.sites import facts_of_accounts, in_force

LEARNED = 0.1
"""A relative error of the private weights at which a clone does the original's job."""


@dataclass(frozen=True)
class Site:
    """A place where rows are answered: one private layer.

    ``width`` is its number of inputs d, ``noise`` the answer noise as a fraction of a typical answer, ``limit`` the
    most rows that one identity is ever answered there (None: counted and not limited). ``facts`` is what else the
    leakage function needs to know of the layer: text that is kept here and not read, empty where there is none.
    Raises ``ConfigurationError`` for values outside their range.
    """

    width: int
    noise: float
    limit: int | None
    facts: str = ""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigurationError(f"a layer of {self.width} inputs; at least 1 is expected")
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise ConfigurationError(f"answer noise {self.noise}; a finite fraction, 0 or more, is expected")
        if self.limit is not None and self.limit < 0:
            raise ConfigurationError(f"a limit of {self.limit} rows; 0 or more is expected, or None for no limit")


@dataclass(frozen=True)
class Account:
    """Rows spent by an identity at a site of an adapter: answered, forfeited by crashes, or leased by a server.

    ``width`` and ``noise`` are the least that were ever in force there, as if all rows had been answered under them:
    what a client learned while the noise was low is not unlearned when it is raised. ``facts`` are all that rows were
    leased under, for the leakage function; none for rows that an earlier version counted.
    """

    identity: str
    adapter: str
    site: str
    rows: int
    width: int
    noise: float
    facts: tuple[str, ...] = ()

    @property
    def learned(self) -> bool:
        """Whether so many rows were answered that the layer must be considered known: as many as it has inputs."""
        return self.rows >= self.width


Leakage = Callable[[Account], float]
"""Relative error of the private weights as rebuilt by the best attack *known* from such an account's rows.

1 says that nothing useful was learned, 0 that the weights are known exactly. An attack nobody has found yet may do
better: it is never a bound."""


@dataclass(frozen=True)
class Standing:
    """An account with what it means: the error of the best known attack, and how many rows are left of a limit."""

    account: Account
    known_attack_error: float
    """Of the best attack that is known, never a bound; NaN where it is not known."""
    remaining: int | None
    """Rows; None where there is no limit."""

    @property
    def learned(self) -> bool:
        """As many rows as the layer has inputs, or fewer from which the best known attack makes a clone."""
        return self.account.learned or self.known_attack_error <= LEARNED


def accounts(database: Database) -> list[Account]:
    """Every account, by identity and adapter, with all rows that servers have leased.

    Raises ``RefusedError`` if the database fails.
    """
    facts = facts_of_accounts(database)
    return [
        Account(*name, row.spent, row.width, row.noise, facts.get(name, ()))
        for row in Leases(database).totals()
        for name in [(row.identity, row.adapter, row.site)]
    ]


def limits(database: Database) -> dict[tuple[str, str], int | None]:
    """(adapter, site) → the limit that the server which declared it last has in force, None for no limit.

    Sites that were last served by an earlier version are missing. Raises ``RefusedError`` if the database fails.
    """
    return {place: facts.limit for place, facts in in_force(database).items()}


def standing(account: Account, leakage: Leakage, limit: int | None) -> Standing:
    """What ``account`` means under ``limit``, with ``leakage`` for the attack. NaN where ``leakage`` knows none."""
    left = None if limit is None else max(0, limit - account.rows)
    return Standing(account, leakage(account), left)
