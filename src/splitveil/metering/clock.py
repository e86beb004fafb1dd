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


def uptime() -> float:
    """Seconds that passed since some moment, by a clock that nobody sets; on Linux those of a suspended machine too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class Clock:
    """Whole seconds since 1970: what ``reading`` shows, or the largest time seen before and what has ``elapsed`` since.

    The larger counts. Seen is what ``reading`` showed since the clock was made, and what any process has recorded in
    ``database``. So time goes on, at its own pace and whether anybody asks or not, when ``reading`` is set back.
    """

    def __init__(
        self,
        database: Database,
        reading: Callable[[], float] = time.time,
        elapsed: Callable[[], float] = uptime,
    ) -> None:
        self._database = database
        self._reading = reading
        self._elapsed = elapsed
        self._lock = threading.Lock()
        with database.read() as connection:
            self._recorded: int = connection.execute(select(state.c.latest)).scalar_one()
        self._latest: float = max(self._recorded, reading())
        self._since = elapsed()
        watch(self)

    def now(self) -> int:
        """The time. Writes it down if a minute has passed since that was last done."""
        latest = self.glance()
        if latest >= self._recorded + GRAIN_SECONDS:
            self.record(latest)
        return latest

    def glance(self) -> int:
        """The time, for the record only: it is not written down as having passed."""
        with self._lock:
            return int(self._advance())

    def learn(self, recorded: int) -> None:
        """Another process has recorded this time."""
        with self._lock:
            self._recorded = max(self._recorded, recorded)
            self._latest = max(self._advance(), recorded)

    def record(self, moment: int) -> None:
        """On return ``moment`` is on disk as having passed."""
        with self._lock:
            if moment <= self._recorded:
                return
        with self._database.write() as connection:
            connection.execute(update(state).where(state.c.latest < moment).values(latest=moment))
        self.learn(moment)

    def _advance(self) -> float:
        """Brings the largest time seen up to now. The lock is held."""
        elapsed = self._elapsed()
        self._latest = max(self._latest + elapsed - self._since, self._reading())
        self._since = elapsed
        return self._latest

    def forked(self) -> None:
        """Another thread of the parent may have held the lock."""
        self._lock = threading.Lock()
