"""The end of the program: connections and servers that are still open are closed while their threads can still end.

All threads of ours are daemons, so that a program which forgot ``disconnect`` ends at all. A daemon that is inside a
kernel or inside gRPC when the interpreter goes away is torn out of it, and that can abort the whole process after its
work was done. Exit functions run before that point.
"""

import atexit
import os
import threading
import weakref
from typing import Protocol

PATIENCE = 10.0
"""Seconds that closing waits for one thread; all of ours end within milliseconds unless the machine is stuck."""


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


def end(threads: list[threading.Thread]) -> None:
    """Waits for threads that were told to end; the one that calls is left out."""
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(PATIENCE)


def _close_all() -> None:
    # Newest first: what was opened later may stand on what was opened before. A fork's child owns none of them.
    for thing, process in reversed(list(_open.items())):
        if process == os.getpid():
            thing.close()


atexit.register(_close_all)
