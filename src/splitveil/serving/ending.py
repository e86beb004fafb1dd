"""The end of the program: connections and servers that are still open are closed while their threads can still end.

All threads of ours are daemons, so that a program which forgot ``disconnect`` ends at all. A daemon that is inside a
kernel or inside gRPC when the interpreter goes away is torn out of it, and that can abort the whole process after its
work was done. Exit functions run before that point.
"""

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Protocol

PATIENCE = 10.0
"""Seconds that closing waits for threads, for all of them together; they end within milliseconds unless they compute
something long, or the machine is stuck."""
HURRIED = 0.5
"""The same, for someone who has said not to wait."""

SHUTTING_DOWN = "this server is shutting down"
"""What a server that drains says to clients, word for word: they tell it from a connection that broke by it."""


class Closable(Protocol):
    """Anything with threads."""

    def close(self) -> None:
        """Ends them; safe to call twice."""


_open: "weakref.WeakKeyDictionary[Closable, int]" = weakref.WeakKeyDictionary()


def close_at_exit(thing: Closable) -> None:
    """Has ``thing`` closed when this process ends normally, if it still exists then."""
    _open[thing] = os.getpid()


def never() -> bool:
    """Nobody hurries."""
    return False


def end(threads: list[threading.Thread], hurry: Callable[[], bool] = never) -> None:
    """Waits for threads that were told to end; the one that calls is left out.

    For ``PATIENCE`` seconds in all, and for ``HURRIED`` once ``hurry()``; what has not ended by then is left behind.
    """
    begun = time.monotonic()
    for thread in threads:
        while thread is not threading.current_thread() and thread.is_alive():
            # Asked every time: the order to hurry may come while we wait.
            left = begun + (HURRIED if hurry() else PATIENCE) - time.monotonic()
            if left <= 0:
                return
            thread.join(min(left, 0.05))


def _close_all() -> None:
    # Newest first: what was opened later may stand on what was opened before. A fork's child owns none of them.
    for thing, process in reversed(list(_open.items())):
        if process == os.getpid():
            thing.close()


atexit.register(_close_all)
