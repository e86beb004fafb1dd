"""Who has connected and not yet said what for: a few at a time, and not for long.

Whoever can reach a port can open calls and say nothing. They cost no key, so they may cost nobody else a place.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Threshold:
    """Bounds how many calls wait for their first message, and how long; thread-safe.

    Where one more comes than there is room for, the one that has waited longest is hung up: an honest client's message
    comes with its call or a moment later, so that is not it.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: dict[object, Callable[[], object]] = {}  # in the order of arrival
        self._closed = False
        self._lock = threading.Lock()

    @contextmanager
    def waiting(self, seconds: float, hang_up: Callable[[], object]) -> Iterator[None]:
        """Within, a message is waited for: ``hang_up()`` is called after so long, or where others need the room.

        It is called in another thread, and has to end the wait there; also when that has just ended by itself.
        """
        with deadline(seconds, hang_up):
            me = object()
            with self._lock:
                longest = self._longest()
                self._waiting[me] = hang_up
            try:
                if longest is not None:
                    longest()
                if self._closed:
                    hang_up()
                yield
            finally:
                with self._lock:
                    self._waiting.pop(me, None)

    def close(self) -> None:
        """Hangs all up, and whoever comes from now on."""
        self._closed = True
        with self._lock:
            everyone = list(self._waiting.values())
        for hang_up in everyone:
            hang_up()

    def _longest(self) -> Callable[[], object] | None:
        """Takes the one that has waited longest out, where there is no room. The lock is held."""
        if len(self._waiting) < self._most:
            return None
        return self._waiting.pop(next(iter(self._waiting)))


@contextmanager
def deadline(seconds: float, hang_up: Callable[[], object]) -> Iterator[None]:
    """Calls ``hang_up()``, in another thread, where what is within takes longer than so many seconds."""
    timer = threading.Timer(seconds, hang_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
