"""API keys: who is let in, who is not, and what is kept of a key."""

import re
import sqlite3
from pathlib import Path

import pytest
from metering_support import Opener, gate_of
from sqlalchemy import select

from splitveil.errors import BudgetExceededError, ConfigurationError, KeyRejectedError, RefusedError
from splitveil.metering import Database, Keyring, accounts, is_key
from splitveil.metering.clock import Clock
from splitveil.metering.keys import RECHECK_SECONDS
from splitveil.metering.storage import schema

pytest_plugins = ("metering_fixtures",)

DAY = 86_400
START = 1_800_000_000


class Hands:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.time: float = START

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def hands() -> Hands:
    return Hands()


@pytest.fixture
def keyring(database: Database, hands: Hands) -> Keyring:
    return Keyring(database, clock=Clock(database, hands))


def wrong(key: str, position: int) -> str:
    """``key`` with one character changed."""
    return key[:position] + ("A" if key[position] != "A" else "B") + key[position + 1 :]


def test_a_key_opens_what_it_is_for(keyring: Keyring) -> None:
    free, _ = keyring.create("acme")
    bound, record = keyring.create("bolt", adapters=["clinic", "legal"])
    assert keyring.authenticate(free, "anything") == "acme"
    assert keyring.authenticate(bound, "clinic") == keyring.authenticate(bound, "legal") == "bolt"
    with pytest.raises(KeyRejectedError, match=rf"API key {record.id} is not for adapter 'other'"):
        keyring.authenticate(bound, "other")


def test_keys_are_long_random_and_unlike(keyring: Keyring) -> None:
    keys = [keyring.create("acme")[0] for _ in range(20)]
    assert len({key[-43:] for key in keys}) == len({key[:15] for key in keys}) == 20
    assert all(is_key(key) and re.fullmatch(r"sv_[0-9a-f]{12}_[\w-]{43}", key, re.ASCII) for key in keys)


def test_a_key_that_is_not_known_is_refused_without_a_reason(keyring: Keyring) -> None:
    key, record = keyring.create("acme", adapters=["clinic"], days=1)
    keyring.revoke(record.id)
    other, _ = keyring.create("bolt")
    swapped = key[:16] + other[16:]
    lengths = ("", "sv_", key[:-1], key + "A", key + "\n", " " + key, key.upper(), "é" * 59, "sv_" + "0" * 500)
    reasons = set()
    for attempt in (wrong(key, 3), wrong(key, 16), wrong(key, 40), swapped, *lengths):
        with pytest.raises(KeyRejectedError) as refused:
            keyring.authenticate(attempt, "clinic")
        reasons.add(str(refused.value))
    assert reasons == {"this API key is not known here; check SPLITVEIL_API_KEY or the key file"}


def test_the_last_character_counts(keyring: Keyring) -> None:
    key, _ = keyring.create("acme")
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    for letter in set(alphabet) - {key[-1]}:
        with pytest.raises(KeyRejectedError):
            keyring.authenticate(key[:-1] + letter, "clinic")


def test_a_revoked_key_stays_revoked(keyring: Keyring, hands: Hands, another: Opener) -> None:
    key, record = keyring.create("acme")
    kept, _ = keyring.create("bolt")
    assert [revoked.id for revoked in keyring.revoke(record.id)] == [record.id]
    assert keyring.revoke(record.id) == []
    hands.time -= 10 * DAY
    for ring in (keyring, Keyring(another(), clock=Clock(another(), hands))):
        with pytest.raises(KeyRejectedError, match=f"API key {record.id} has been revoked"):
            ring.authenticate(key, "clinic")
        assert ring.authenticate(kept, "clinic") == "bolt"


def test_revoking_a_name_revokes_all_its_keys(keyring: Keyring) -> None:
    keys = [keyring.create("acme")[0] for _ in range(3)]
    assert len(keyring.revoke("acme")) == 3
    for key in keys:
        with pytest.raises(KeyRejectedError):
            keyring.authenticate(key, "clinic")
    with pytest.raises(ConfigurationError, match="no key has the id or name 'nobody'"):
        keyring.revoke("nobody")


def test_a_key_expires(keyring: Keyring, hands: Hands) -> None:
    key, record = keyring.create("acme", days=1.5)
    assert record.expires == START + 1.5 * DAY
    hands.time = record.expires - 1
    assert keyring.authenticate(key, "clinic") == "acme"
    hands.time = record.expires
    with pytest.raises(KeyRejectedError, match=f"API key {record.id} has expired"):
        keyring.authenticate(key, "clinic")


def test_a_clock_set_back_revives_no_key(keyring: Keyring, hands: Hands, another: Opener) -> None:
    key, record = keyring.create("acme", days=1)
    hands.time = START + DAY
    with pytest.raises(KeyRejectedError, match="expired"):
        keyring.authenticate(key, "clinic")
    hands.time = START - 365 * DAY
    restarted = another()
    for ring in (keyring, Keyring(restarted, clock=Clock(restarted, hands))):
        with pytest.raises(KeyRejectedError, match=f"API key {record.id} has expired"):
            ring.authenticate(key, "clinic")


def test_a_clock_set_back_by_seconds_revives_no_key(keyring: Keyring, hands: Hands, another: Opener) -> None:
    key, _ = keyring.create("acme", days=30 / DAY)
    hands.time += 31
    with pytest.raises(KeyRejectedError, match="expired"):
        keyring.authenticate(key, "clinic")
    hands.time -= 10
    restarted = another()
    with pytest.raises(KeyRejectedError, match="expired"):
        Keyring(restarted, clock=Clock(restarted, hands)).authenticate(key, "clinic")


def test_a_clock_set_back_after_an_idle_time_revives_no_key(database: Database, hands: Hands) -> None:
    """Nobody asked anything between the expiry and the setting back: only what cannot be set has seen time pass."""
    ticks = Hands()
    keyring = Keyring(database, clock=Clock(database, hands, ticks))
    key, _ = keyring.create("acme", days=1)
    idle = keyring.admit(key, "clinic")
    idle.check()
    ticks.time += 2 * DAY  # and the wall clock, two days later, is set back to where it was
    with pytest.raises(KeyRejectedError, match="expired"):
        idle.check()
    with pytest.raises(KeyRejectedError, match="expired"):
        keyring.authenticate(key, "clinic")


def test_a_clock_runs_on_from_the_largest_time_that_was_seen(another: Opener, hands: Hands) -> None:
    ticks = Hands()
    clocks = [Clock(another(), hands, ticks) for _ in range(2)]
    assert clocks[0].now() == START
    hands.time += 3600
    assert clocks[0].now() == START + 3600
    hands.time -= 30 * DAY
    ticks.time += 100
    assert clocks[0].now() == START + 3700
    hands.time += 60 * DAY
    assert clocks[0].now() == START + 30 * DAY + 3600
    ticks.time += 1000
    clocks[1].learn(START + 40 * DAY)  # as of now: what went by before is not added
    assert clocks[1].now() == START + 40 * DAY
    ticks.time += 1
    assert clocks[1].now() == START + 40 * DAY + 1
    clocks[1].record(clocks[1].now())
    restarted = Clock(another(), lambda: START - 365 * DAY, ticks)
    assert restarted.now() == START + 40 * DAY + 1


def test_time_is_recorded_without_any_refusal(keyring: Keyring, hands: Hands, another: Opener) -> None:
    """A server that answered others after the expiry, went down, and came back with its clock set back."""
    key, _ = keyring.create("acme", days=1)
    other, _ = keyring.create("bolt")
    hands.time = START + DAY + 60
    keyring.authenticate(other, "clinic")
    hands.time = START
    restarted = another()
    with pytest.raises(KeyRejectedError, match="expired"):
        Keyring(restarted, clock=Clock(restarted, hands)).authenticate(key, "clinic")


def test_a_clock_set_back_refunds_no_rows(another: Opener) -> None:
    for hours in (0, -1, -10_000, 10_000):
        database = another()
        hands = Hands()
        hands.time += 3600 * hours
        gate = gate_of(database, 100)
        gate._clock = Clock(database, hands)
        if hours == 0:
            gate.reserve("acme", "clinic", "q", 100)
        with pytest.raises(BudgetExceededError):
            gate.reserve("acme", "clinic", "q", 1)
    assert accounts(database)[0].rows == 100


def test_other_servers_learn_the_time(another: Opener) -> None:
    """Two servers are up; one has its clock back and sees the key first after the other refused it."""
    ahead, behind = Hands(), Hands()
    rings = []
    for hands in (ahead, behind):
        database = another()
        rings.append(Keyring(database, clock=Clock(database, hands)))
    key, _ = rings[0].create("acme", days=1)
    assert rings[1].authenticate(key, "clinic") == "acme"
    ahead.time += DAY
    for ring in rings:
        with pytest.raises(KeyRejectedError, match="expired"):
            ring.authenticate(key, "clinic")


def test_a_renewed_key_carries_on_the_account(keyring: Keyring, database: Database) -> None:
    gate = gate_of(database, 100)
    key, record = keyring.create("acme")
    gate.reserve(keyring.authenticate(key, "clinic"), "clinic", "q", 100)
    keyring.revoke(record.id)
    renewed, _ = keyring.create("acme")
    with pytest.raises(BudgetExceededError):
        gate.reserve(keyring.authenticate(renewed, "clinic"), "clinic", "q", 1)


def test_an_open_session_ends_when_its_key_does(database: Database, hands: Hands) -> None:
    seconds = Hands()
    keyring = Keyring(database, clock=Clock(database, hands), monotonic=seconds)
    key, record = keyring.create("acme", days=1)
    revoked, expired = keyring.admit(key, "clinic"), keyring.admit(keyring.create("bolt", days=1)[0], "clinic")
    revoked.check()
    keyring.revoke(record.id)
    seconds.time += RECHECK_SECONDS
    for _ in range(2):
        with pytest.raises(KeyRejectedError, match="revoked"):
            revoked.check()
    expired.check()
    hands.time += DAY
    with pytest.raises(KeyRejectedError, match="expired"):
        expired.check()


def test_checks_of_a_session_ask_the_database_every_few_seconds(database: Database) -> None:
    seconds = Hands()
    keyring = Keyring(database, monotonic=seconds)
    admission = keyring.admit(keyring.create("acme")[0], "clinic")
    database.close()
    with database.write() as connection:
        schema.revocations.drop(connection)
    admission.check()
    seconds.time += RECHECK_SECONDS
    with pytest.raises(RefusedError, match="cannot use its ledger"):
        admission.check()


def test_no_key_is_kept_or_shown(tmp_path: Path) -> None:
    file = tmp_path / "ledger.db"
    with Database(f"sqlite:///{file}") as database:
        keyring = Keyring(database)
        key, record = keyring.create("acme", adapters=["clinic"])
        admission = keyring.admit(key, "clinic")
        with database.read() as connection:
            digest = connection.execute(select(schema.keys.c.digest)).scalar_one()
        shown = repr((record, admission, keyring, database, keyring.records()))
    secret = key[16:]
    assert secret not in shown
    assert digest.hex() not in shown
    assert len(digest) == 32
    for written in tmp_path.iterdir():
        assert secret.encode() not in written.read_bytes()
    with sqlite3.connect(file) as plain:
        assert secret not in "\n".join(plain.iterdump())
    plain.close()


@pytest.mark.parametrize("name", ["", "x" * 65, "a\nb", " a", "a ", "anonymous", "0123456789ab", "\x00"])
def test_names_that_no_key_can_have(keyring: Keyring, name: str) -> None:
    with pytest.raises(ConfigurationError, match="key name"):
        keyring.create(name)


def test_a_key_in_place_of_a_name_is_refused_and_not_repeated(keyring: Keyring) -> None:
    secret, key = keyring.create("acme")
    for text in (secret, secret[:-1], f"SPLITVEIL_API_KEY={secret}"):
        for way in (keyring.create, keyring.revoke):
            with pytest.raises(ConfigurationError, match=f"Revoke it by its id, {key.id}") as refused:
                way(text)
            assert secret[16:30] not in str(refused.value)
    assert [record.name for record in keyring.records()] == ["acme"]


def test_options_that_no_key_can_have(keyring: Keyring) -> None:
    for days in (0, -1, float("nan"), float("inf"), 1e9):
        with pytest.raises(ConfigurationError, match="expires after"):
            keyring.create("acme", days=days)
    for adapters in ([], [""], ["clinic", ""]):
        with pytest.raises(ConfigurationError, match="no adapter"):
            keyring.create("acme", adapters=adapters)
    assert keyring.records() == []
