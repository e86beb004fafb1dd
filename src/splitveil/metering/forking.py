"""Objects that hold locks, connections or leases, and give them up in a forked process."""

import os
from typing import Protocol
from weakref import WeakSet


class Forkable(Protocol):
    """Something that must not be used after a fork as it was before."""

    def forked(self) -> None:
        """Called in the child, where no other thread runs, before anything else does."""
        ...


_WATCHED: "WeakSet[Forkable]" = WeakSet()


def watch(thing: Forkable) -> None:
    """Calls ``thing.forked()`` in every process that is forked from now on."""
    _WATCHED.add(thing)


def _after_fork() -> None:
    for thing in list(_WATCHED):
        thing.forked()


os.register_at_fork(after_in_child=_after_fork)
