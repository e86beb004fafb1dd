"""A clock that never runs backwards, also over restarts: the largest time ever seen is kept in the database."""

import threading
import time
from collections.abc import Callable

from sqlalchemy import select, update

from splitveil.metering.forking import watch
from splitveil.metering.storage.database import Database
from splitveil.metering.storage.schema import state

GRAIN_SECONDS = 60
"""How far time moves on before it is written down again; what depends on it is written down at once."""


class Clock:
    """Whole seconds since 1970, by ``reading``, at least the largest that any process has recorded in ``database``."""

    def __init__(self, database: Database, reading: Callable[[], float] = time.time) -> None:
        self._database = database
        self._reading = reading
        self._lock = threading.Lock()
        with database.read() as connection:
            self._recorded: int = connection.execute(select(state.c.latest)).scalar_one()
        self._latest: int = self._recorded
        watch(self)

    def now(self) -> int:
        """The time. Writes it down if a minute has passed since that was last done."""
        with self._lock:
            self._latest = max(self._latest, int(self._reading()))
            latest, due = self._latest, self._latest >= self._recorded + GRAIN_SECONDS
        if due:
            self.record(latest)
        return latest

    def glance(self) -> int:
        """The time, for the record only: it is not written down as having passed."""
        with self._lock:
            return max(self._latest, int(self._reading()))

    def learn(self, recorded: int) -> None:
        """Another process has recorded this time."""
        with self._lock:
            self._recorded = max(self._recorded, recorded)
            self._latest = max(self._latest, recorded)

    def record(self, moment: int) -> None:
        """On return ``moment`` is on disk as having passed."""
        with self._lock:
            if moment <= self._recorded:
                return
        with self._database.write() as connection:
            connection.execute(update(state).where(state.c.latest < moment).values(latest=moment))
        self.learn(moment)

    def forked(self) -> None:
        """Another thread of the parent may have held the lock."""
        self._lock = threading.Lock()
