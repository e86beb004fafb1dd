"""API keys: made, shown once, kept as digests, checked, revoked."""

import base64
import hashlib
import hmac
import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from splitveil.errors import ConfigurationError, KeyRejectedError
from splitveil.metering.clock import Clock
from splitveil.metering.forking import watch
from splitveil.metering.storage.database import Database
from splitveil.metering.storage.keys import Stored, find, insert_key, insert_revocations, stored_keys

RESERVED = "anonymous"
"""The identity of clients on a server that asks for no key."""
RECHECK_SECONDS = 5.0
MAX_NAME = 64
DAY = 86_400

# sv_, the key's public number (48 bits), and 256 bits from the operating system.
_KEY = re.compile(r"sv_([0-9a-f]{12})_[A-Za-z0-9_-]{43}", re.ASCII)
_ID = re.compile(r"[0-9a-f]{12}", re.ASCII)
_ANYWHERE = re.compile(r"sv_([0-9a-f]{12})_[A-Za-z0-9_-]+", re.ASCII)
_UNKNOWN = "this API key is not known here; check SPLITVEIL_API_KEY or the key file"


@dataclass(frozen=True)
class Key:
    """A key as its vendor sees it; never the key itself.

    ``adapters`` None: every adapter. Times are seconds since 1970 (UTC), None: never.
    """

    id: str
    name: str
    adapters: tuple[str, ...] | None
    created: int
    expires: int | None
    revoked: int | None


class Keyring:
    """The keys of a database.

    The identity of a client is the *name* of its key: a key that replaces another under the same name carries on the
    same account, so that renewing keys refunds no rows.
    """

    def __init__(
        self, database: Database, *, clock: Clock | None = None, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._database = database
        self._clock = clock or Clock(database)
        self._monotonic = monotonic

    def create(self, name: str, *, adapters: Sequence[str] | None = None, days: float | None = None) -> tuple[str, Key]:
        """(the key, which is nowhere kept, and its record). Raises ``ConfigurationError`` for what no key can have."""
        _refuse_keys(name)
        _check_name(name)
        if adapters is not None and not (adapters and all(adapters)):
            raise ConfigurationError("a key for no adapter, or for one without a name; leave adapters out to allow all")
        if days is not None and not 0 < days <= 36_500:
            raise ConfigurationError(f"a key that expires after {days} days; more than 0, at most 36,500 can be")
        now = self._clock.now()
        expires = None if days is None else now + max(1, int(days * DAY))
        allowed = None if adapters is None else tuple(sorted(set(adapters)))
        number = secrets.token_hex(6)
        key = f"sv_{number}_" + base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()
        insert_key(self._database, Stored(number, name, _digest(key), allowed, now, expires, None))
        return key, Key(number, name, allowed, now, expires, None)

    def revoke(self, which: str) -> list[Key]:
        """Revokes the key of that id, or all keys of that name; for ever. Returns those that were not revoked yet.

        Raises ``ConfigurationError`` if there is no such key, and for a whole key in place of its id, unrepeated.
        """
        _refuse_keys(which)
        found = [key for key in self.records() if which in (key.id, key.name)]
        if not found:
            raise ConfigurationError(f"no key has the id or name {which[:MAX_NAME]!r}; see splitveil keys list")
        now = self._clock.now()
        valid = [key for key in found if key.revoked is None]
        insert_revocations(self._database, [key.id for key in valid], now)
        return [Key(key.id, key.name, key.adapters, key.created, key.expires, now) for key in valid]

    def records(self) -> list[Key]:
        """All keys, oldest first."""
        return [_record(stored) for stored in stored_keys(self._database)]

    def authenticate(self, key: str, adapter: str) -> str:
        """The identity of the client that shows ``key`` and asks for ``adapter``.

        Raises ``KeyRejectedError``; the reason is named only to who has proven to hold the key. ``RefusedError`` if the
        database fails.
        """
        return self.admit(key, adapter).identity

    def admit(self, key: str, adapter: str) -> "Admission":
        """As ``authenticate``, for a session: the result can be checked again, query by query."""
        match = _KEY.fullmatch(key)
        if match is None:
            raise KeyRejectedError(_UNKNOWN)
        stored = self._verify(match[1], _digest(key), adapter)
        return Admission(self, stored, adapter, self._monotonic)

    def _verify(self, number: str, digest: bytes, adapter: str) -> Stored:
        stored, latest = find(self._database, number)
        self._clock.learn(latest)
        if stored is None or not hmac.compare_digest(stored.digest, digest):
            raise KeyRejectedError(_UNKNOWN)
        if stored.revoked is not None:
            raise KeyRejectedError(f"API key {number} has been revoked; ask the vendor for another")
        self._check_expiry(stored)
        if stored.adapters is not None and adapter not in stored.adapters:
            raise KeyRejectedError(f"API key {number} is not for adapter {adapter[:MAX_NAME]!r}; it is for another")
        return stored

    def _check_expiry(self, stored: Stored) -> None:
        now = self._clock.now()
        if stored.expires is not None and now >= stored.expires:
            self._clock.record(now)  # so that no clock, set back, revives what was once refused
            raise KeyRejectedError(f"API key {stored.id} has expired; ask the vendor for another")


class Admission:
    """A client that has shown a valid key."""

    def __init__(self, keyring: Keyring, stored: Stored, adapter: str, monotonic: Callable[[], float]) -> None:
        self.identity = stored.name
        self._keyring = keyring
        self._stored = stored
        self._adapter = adapter
        self._monotonic = monotonic
        self._checked = monotonic()
        self._lock = threading.Lock()
        watch(self)

    def check(self) -> None:
        """Returns while the key is valid; asks the database every 5 seconds.

        A session that was open when its key was revoked ends by this. Raises ``KeyRejectedError``, or ``RefusedError``
        if the database fails.
        """
        self._keyring._check_expiry(self._stored)
        with self._lock:
            if self._monotonic() - self._checked < RECHECK_SECONDS:
                return
            self._keyring._verify(self._stored.id, self._stored.digest, self._adapter)
            self._checked = self._monotonic()

    def forked(self) -> None:
        """Another thread of the parent may have held the lock."""
        self._lock = threading.Lock()


def is_key(text: str) -> bool:
    """Whether ``text`` has the form of a key."""
    return _KEY.fullmatch(text) is not None


def _digest(key: str) -> bytes:
    # One SHA-256 and no salt: slow, salted hashes make guessing at passwords dear. There are 2^256 keys, drawn evenly,
    # and no two alike; nobody guesses one, however fast the hash, and every query of a session may afford this one.
    return hashlib.sha256(key.encode()).digest()


def _refuse_keys(text: str) -> None:
    """An API key, or most of one, where its id or a name belongs: what is typed stays in histories and logs."""
    if match := _ANYWHERE.search(text):
        raise ConfigurationError(
            f"this is an API key itself, and not a name or an id; it is in your shell's history now. "
            f"Revoke it by its id, {match[1]}, and make another"
        )


def _check_name(name: str) -> None:
    if not name or len(name) > MAX_NAME or not name.isprintable() or name != name.strip():
        raise ConfigurationError(f"key name {name[:MAX_NAME]!r} must be printable and 1 to {MAX_NAME} characters long")
    if name == RESERVED or _ID.fullmatch(name):
        raise ConfigurationError(f"key name {name!r} is taken: it stands for clients without a key, or for a key's id")


def _record(stored: Stored) -> Key:
    return Key(stored.id, stored.name, stored.adapters, stored.created, stored.expires, stored.revoked)
