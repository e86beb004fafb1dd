"""The heartbeat: time that passes while nobody asks is known after a restart, and no thread stays behind."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from metering_support import Opener

from splitveil.embedded import folder
from splitveil.errors import KeyRejectedError, RefusedError
from splitveil.metering import Clock, Database, Keyring
from splitveil.serving.heartbeat import Heartbeat
from splitveil.serving.serve import serve

pytest_plugins = ("metering_fixtures",)

DAY = 86_400
START = 1_800_000_000
NAME = "splitveil-heartbeat"


def beating() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == NAME]


def recorded(database: Database) -> int:
    """What a restarted process, its clock set back to the beginning, takes for the time."""
    return Clock(database, lambda: 0.0).now()


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)


def test_a_key_that_expired_while_nobody_asked_stays_expired_after_a_restart(another: Opener) -> None:
    now = {"wall": float(START), "ticks": 0.0}
    database = another()
    clock = Clock(database, lambda: now["wall"], lambda: now["ticks"])
    key, _ = Keyring(database, clock=clock).create("acme", days=1)
    with Heartbeat(clock) as heartbeat:
        now["wall"] += 2 * DAY
        now["ticks"] += 2 * DAY
        heartbeat.beat()  # a minute's; nobody has asked anything
        now["wall"] = START
        restarted = another()  # after a crash: nothing was closed
        for hours in (0, -1000):
            ring = Keyring(restarted, clock=Clock(restarted, lambda hours=hours: START + 3600.0 * hours))  # type: ignore[misc]
            with pytest.raises(KeyRejectedError, match="expired"):
                ring.authenticate(key, "clinic")


def test_it_writes_at_the_beginning_once_a_while_and_at_the_end(database: Database) -> None:
    now = [float(START)]
    heartbeat = Heartbeat(Clock(database, lambda: now[0], lambda: 0.0), seconds=0.001)
    eventually(lambda: recorded(database) == START)
    now[0] += 7
    eventually(lambda: recorded(database) == START + 7)
    heartbeat.close()
    slow = Heartbeat(Clock(database, lambda: now[0], lambda: 0.0))
    now[0] += 7
    slow.close()
    slow.close()
    assert recorded(database) == START + 14
    assert beating() == []


def test_a_database_that_fails_is_tried_again(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [float(START)]
    clock = Clock(database, lambda: now[0], lambda: 0.0)
    record, tries = clock.record, threading.Semaphore(0)

    def broken(moment: int) -> None:
        tries.release()
        raise RefusedError("the ledger cannot be used")

    monkeypatch.setattr(clock, "record", broken)
    with Heartbeat(clock, seconds=0.001):
        for _ in range(3):
            assert tries.acquire(timeout=60)
        monkeypatch.setattr(clock, "record", record)
        eventually(lambda: recorded(database) == START)


def test_a_fork_has_no_heartbeat_and_can_close_it(database: Database) -> None:
    with Heartbeat(Clock(database), seconds=0.001) as heartbeat:
        child = os.fork()
        if child == 0:
            heartbeat.close()
            os._exit(len(beating()))
        assert os.waitpid(child, 0)[1] == 0
        assert len(beating()) == 1
    assert beating() == []


def test_a_server_with_a_ledger_has_one_as_long_as_it_runs(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.sqlite'}"
    with serve({"clinic": folder("clinic")}, "127.0.0.1:0", ledger=url):
        assert len(beating()) == 1
        with Database(url) as database:
            eventually(lambda: recorded(database) >= int(time.time()) - 60)
    assert beating() == []
    with serve({"clinic": folder("clinic")}, "127.0.0.1:0"):
        assert beating() == []
