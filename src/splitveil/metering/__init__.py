"""Who asked, and how many rows they were answered: API keys and the ledger, on SQLite or PostgreSQL.

Knows nothing of what it counts: which attack makes what of so many rows is a function that the caller hands in.
"""

from splitveil.metering.accounts import LEARNED, Account, Leakage, Site, Standing, accounts, limits, standing
from splitveil.metering.clock import Clock
from splitveil.metering.keys import Admission, Key, Keyring, is_key
from splitveil.metering.ledger import LedgerGate
from splitveil.metering.storage.database import Database
from splitveil.metering.storage.location import default_location, locate

__all__ = [
    "LEARNED",
    "Account",
    "Admission",
    "Clock",
    "Database",
    "Key",
    "Keyring",
    "Leakage",
    "LedgerGate",
    "Site",
    "Standing",
    "accounts",
    "default_location",
    "is_key",
    "limits",
    "locate",
    "standing",
]
