"""The sessions of a server: how many there may be, what is told of them, and how they come to an end together.

Logs and metrics name no client, no key and nothing that was sent; a client's name is logged where the operator asks.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc

from splitveil.serving.ending import SHUTTING_DOWN
from splitveil.serving.gate import ANONYMOUS, Rejected
from splitveil.serving.operations.logs import tell
from splitveil.serving.operations.metrics import AdapterMetrics, Metrics

log = logging.getLogger(__name__)

QUIET_SECONDS = 1.0
"""A session without a query for so long is not in the middle of a generation."""


class Visit:
    """One session: what it did so far. Its methods are the answer loop's, and cost little."""

    __slots__ = (
        "_all",
        "_begun",
        "_metrics",
        "_told",
        "adapter",
        "busy",
        "heard",
        "number",
        "overdue",
        "queries",
        "refused",
        "rows",
    )

    def __init__(self, everyone: "Visits", number: int) -> None:
        self._all = everyone
        self._metrics: AdapterMetrics | None = None
        self._told: set[str] = set()
        self._begun = self.heard = time.monotonic()
        self.number = number
        self.adapter = ""
        self.busy = True
        """While something is computed or sent for it; also until its publication is sent."""
        self.overdue = False
        """Whether it was ended for what it did not send in time."""
        self.queries = self.rows = self.refused = 0

    def admitted(self, identity: str, adapter: str) -> None:
        """Who it is, and what it wants; from now on it takes a place. Raises ``Rejected`` where there is none."""
        self._all.admit(self)
        self.adapter = adapter
        if self._all.metrics is not None:
            self._metrics = self._all.metrics.adapter(adapter)
        fields: dict[str, Any] = {"session": self.number, "adapter": adapter}
        if self._all.log_identities and identity != ANONYMOUS:
            fields["client"] = identity
        tell(log, logging.INFO, "session_opened", **fields)

    def sent(self, size: int) -> None:
        """Bytes of the welcome and the publication."""
        if self._metrics is not None:
            self._metrics.sent(size)

    def rest(self) -> None:
        """Nothing is owed to the client now."""
        self.busy = False

    def asked(self) -> float:
        """A query has arrived; returns when, for ``answered``. Raises ``Rejected`` where no more are answered."""
        if self._all.finished:
            raise Rejected(grpc.StatusCode.UNAVAILABLE, SHUTTING_DOWN, "shutdown")
        self.busy = True
        self.heard = time.monotonic()
        return self.heard

    def answered(self, begun: float, rows: int, received: int, sent: int) -> None:
        """It has been answered. ``received`` and ``sent`` are bytes."""
        self.queries += 1
        self.rows += rows
        if self._metrics is not None:
            self._metrics.answered(rows, received, sent, time.monotonic() - begun)

    def turned_down(self, kind: str) -> None:
        """A query was refused: "malformed", "budget", "key" or "database"."""
        self.refused += 1
        if self._metrics is not None:
            self._metrics.refused(kind)
        if kind not in self._told:  # once a session: a client that goes on asking does not fill the disk
            self._told.add(kind)
            tell(log, logging.INFO, "query_refused", session=self.number, adapter=self.adapter, kind=kind)

    def ended(self, reason: str, detail: str) -> None:
        """It is over."""
        more = {"detail": detail} if detail else {}
        if not self.adapter:
            tell(log, logging.INFO, "session_refused", session=self.number, reason=reason, **more)
            if self._all.metrics is not None:
                self._all.metrics.session_refused(reason)
            return
        tell(
            log,
            logging.WARNING if reason == "malformed" else logging.INFO,
            "session_ended",
            session=self.number,
            adapter=self.adapter,
            seconds=round(time.monotonic() - self._begun, 3),
            queries=self.queries,
            rows=self.rows,
            refused=self.refused,
            reason=reason,
            **more,
        )


class Visits:
    """All sessions of one server; thread-safe.

    Those that are open were admitted: who has not said anything yet, or has no key, takes nobody's place.
    """

    def __init__(self, most: int, *, metrics: Metrics | None = None, log_identities: bool = False) -> None:
        self.metrics = metrics
        self.log_identities = log_identities
        self.draining = False
        """No session begins any more."""
        self.finished = False
        """No query is answered any more."""
        self._most = most
        self._open: set[Visit] = set()
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)

    def enter(self) -> Visit:
        """A new session, which is not open yet."""
        return Visit(self, next(self._numbers))

    def admit(self, visit: Visit) -> None:
        """Opens a session. Raises ``Rejected`` where there is no room, and while the server is shutting down."""
        with self._lock:
            self.require_running()
            if len(self._open) >= self._most:
                raise Rejected(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many sessions are open", "sessions")
            self._open.add(visit)
            if self.metrics is not None:
                self.metrics.session_opened()

    def require_running(self) -> None:
        """Raises ``Rejected`` while the server is shutting down."""
        if self.draining:
            raise Rejected(grpc.StatusCode.UNAVAILABLE, SHUTTING_DOWN, "shutdown")

    def leave(self, visit: Visit, reason: str, detail: str) -> None:
        """A session is over."""
        with self._lock:
            if visit in self._open:
                self._open.remove(visit)
                if self.metrics is not None:
                    self.metrics.session_closed()
        visit.ended(reason, detail)

    def drain(self, seconds: float, hurry: Callable[[], bool]) -> None:
        """Lets no session begin, and those that are generating go on: for so long, while there are any, or ``hurry()``.

        Returns when every session may be cut: from then on, queries are refused.
        """
        self.draining = True
        tell(log, logging.INFO, "draining", sessions=len(self._open), seconds=seconds)
        self._wait(seconds, QUIET_SECONDS, hurry)
        self.finished = True
        # Who has just been answered asks again in a moment, and is told why it ends rather than cut off.
        self._wait(QUIET_SECONDS / 2, QUIET_SECONDS / 2, hurry)

    def _wait(self, seconds: float, quiet: float, hurry: Callable[[], bool]) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and self._occupied(quiet) and not hurry():
            time.sleep(min(left, 0.02))

    def _occupied(self, quiet: float) -> bool:
        """Whether a session is being answered, or was within ``quiet`` seconds."""
        since = time.monotonic() - quiet
        with self._lock:
            return any(visit.busy or visit.heard > since for visit in self._open)
