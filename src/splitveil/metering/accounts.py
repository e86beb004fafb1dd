"""What the ledger says of an account: rows, and what the best attack that is known makes of so many."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from splitveil.errors import ConfigurationError
from splitveil.metering.storage.database import Database
from splitveil.metering.storage.leases import Leases


@dataclass(frozen=True)
class Site:
    """A place where rows are answered: one private layer.

    ``width`` is its number of inputs d, ``noise`` the answer noise as a fraction of a typical answer, ``limit`` the
    most rows that one identity is ever answered there (None: counted and not limited).
    Raises ``ConfigurationError`` for values outside their range.
    """

    width: int
    noise: float
    limit: int | None

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
    what a client learned while the noise was low is not unlearned when it is raised.
    """

    identity: str
    adapter: str
    site: str
    rows: int
    width: int
    noise: float

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
    remaining: int | None


def accounts(database: Database) -> list[Account]:
    """Every account, by identity and adapter, with all rows that servers have leased.

    Raises ``RefusedError`` if the database fails.
    """
    return [
        Account(row.identity, row.adapter, row.site, row.spent, row.width, row.noise)
        for row in Leases(database).totals()
    ]


def standing(account: Account, leakage: Leakage, limit: int | None) -> Standing:
    """What ``account`` means under ``limit``, with ``leakage`` for the attack. NaN where ``leakage`` knows none."""
    left = None if limit is None else max(0, limit - account.rows)
    return Standing(account, leakage(account), left)
