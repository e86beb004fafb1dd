"""A thread a session."""

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from splitveil.serving.ending import end, never


class SessionThreads(Executor):
    """A thread a session; how many there are is limited by whoever submits.

    Unlike those of a ``ThreadPoolExecutor`` they end with their session, and a program that ends without closing its
    server is not kept alive by them.
    """

    def __init__(self, name: str = "splitveil-session") -> None:
        self._name = name
        self._running: set[threading.Thread] = set()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Runs the call in a thread of its own."""
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - whose it is, the future's reader decides
                future.set_exception(error)
            finally:
                self._running.discard(thread)

        thread = threading.Thread(target=run, name=self._name, daemon=True)
        self._running.add(thread)
        thread.start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Waits for the sessions, which the server has ended."""
        if wait:
            self.end(never)

    def end(self, hurry: Callable[[], bool]) -> None:
        """The same, for less long once ``hurry()``. Who was waited for in vain is not waited for again."""
        running = list(self._running)
        end(running, hurry)
        self._running.difference_update(running)
