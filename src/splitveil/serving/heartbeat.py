"""A server's heartbeat: the ledger's time is written down while nobody asks, so that it is known after a restart."""

import contextlib
import threading
from types import TracebackType

from splitveil.errors import RefusedError
from splitveil.metering import Clock
from splitveil.metering.clock import GRAIN_SECONDS
from splitveil.metering.forking import watch
from splitveil.serving.ending import close_at_exit, end


class Heartbeat:
    """Writes the time of ``clock`` down at the beginning, once a minute, and when it is closed; a context manager."""

    def __init__(self, clock: Clock, seconds: float = GRAIN_SECONDS) -> None:
        self._clock = clock
        self._seconds = seconds
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, name="splitveil-heartbeat", daemon=True)]
        watch(self)
        close_at_exit(self)
        self._threads[0].start()

    def beat(self) -> None:
        """Writes the time down, unless the database fails, which logs it: the next beat tries again."""
        with contextlib.suppress(RefusedError):
            self._clock.record(self._clock.now())

    def _run(self) -> None:
        self.beat()
        while not self._over.wait(self._seconds):
            self.beat()
        self.beat()

    def close(self) -> None:
        """Ends the thread; safe to call twice."""
        self._over.set()
        end(self._threads)

    def forked(self) -> None:
        """The thread is the parent's, which may have held the event's lock."""
        self._over = threading.Event()
        self._threads = []

    def __enter__(self) -> "Heartbeat":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
