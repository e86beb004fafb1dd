"""A server process under its operator's signals: SIGTERM drains, Ctrl-C too but briefly, SIGHUP reloads."""

import queue
import signal
from collections.abc import Callable
from types import FrameType

from splitveil.serving.host import Host

INTERRUPT_SECONDS = 1.0
"""Ctrl-C drains for so long at most: somebody is waiting at a terminal."""


def run(
    server: Host, *, drain: float, reload: Callable[[Callable[[], bool]], None], announce: Callable[[], None]
) -> None:
    """Blocks until SIGTERM or SIGINT, drains ``server`` for at most ``drain`` seconds and closes it.

    ``announce()`` is called as soon as signals are heeded, ``reload(told)`` at SIGHUP; it may stop once ``told()``. A
    second SIGTERM or SIGINT ends the drain at once. The main thread's alone.
    """
    # Putting into a SimpleQueue is safe in a signal handler, whatever it has interrupted.
    orders: queue.SimpleQueue[int] = queue.SimpleQueue()
    told: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        told.append(number)  # not an Event: its lock may be held by what the signal has interrupted
        orders.put(number)

    def again(number: int, frame: FrameType | None) -> None:
        orders.put(number)

    handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]] = {
        signal.SIGTERM: stop,
        signal.SIGINT: stop,
    }
    if hasattr(signal, "SIGHUP"):  # Windows has none
        handlers[signal.SIGHUP] = again
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        announce()
        while (order := orders.get()) not in (signal.SIGTERM, signal.SIGINT):
            if not told:
                reload(lambda: bool(told))
        server.drain(drain if order == signal.SIGTERM else min(drain, INTERRUPT_SECONDS), lambda: len(told) > 1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
