"""Figures of a server for Prometheus. They name adapters, and no client, no key and nothing that was sent.

Counted here, in plain numbers behind one lock an adapter, and handed to the library when it asks: its own counters take
several times as long for each query.
"""

import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
"""Upper ends of the histogram's buckets."""
REASONS = (
    *("sessions", "shutdown", "version", "key", "adapter", "budget"),
    *("database", "malformed", "replaced", "silent", "error"),
)
KINDS = ("malformed", "budget", "key", "database")


class Metrics(Collector):
    """All figures of one server, in a registry of its own; thread-safe."""

    def __init__(self, adapters: Iterable[str]) -> None:
        self._lock = threading.Lock()
        self._open = 0
        self._refused = dict.fromkeys(REASONS, 0)
        self._expires: float | None = None
        self._adapters = {name: AdapterMetrics() for name in adapters}
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def adapter(self, name: str) -> "AdapterMetrics":
        """The figures of one adapter."""
        return self._adapters[name]

    def session_opened(self) -> None:
        """One more."""
        with self._lock:
            self._open += 1

    def session_closed(self) -> None:
        """One less."""
        with self._lock:
            self._open -= 1

    def session_refused(self, reason: str) -> None:
        """A session was refused, for one of ``REASONS``."""
        with self._lock:
            self._refused[reason] += 1

    def certificate_expires(self, moment: float) -> None:
        """When the TLS certificate ends, in seconds since 1970; without TLS there is no such figure."""
        self._expires = moment

    def collect(self) -> Iterator[Metric]:
        """The library's hook: everything as it is now."""
        yield GaugeMetricFamily("splitveil_sessions_open", "Sessions open now.", value=self._open)
        refused = CounterMetricFamily("splitveil_sessions_refused", "Sessions refused, by reason.", labels=["reason"])
        for reason, count in self._refused.items():
            refused.add_metric([reason], count)
        yield refused
        if self._expires is not None:
            name = "splitveil_certificate_expires_timestamp_seconds"
            yield GaugeMetricFamily(name, "When the TLS certificate ends.", value=self._expires)
        yield from self._of_adapters()

    def _of_adapters(self) -> Iterator[Metric]:
        label = ["adapter"]
        queries = CounterMetricFamily("splitveil_queries", "Queries answered.", labels=label)
        rows = CounterMetricFamily("splitveil_rows", "Rows of answered queries.", labels=label)
        received = CounterMetricFamily("splitveil_received_bytes", "Bytes of answered queries.", labels=label)
        sent = CounterMetricFamily("splitveil_sent_bytes", "Bytes of answers and publications.", labels=label)
        failed = CounterMetricFamily("splitveil_replacements_failed", "Replacements that failed.", labels=label)
        version = GaugeMetricFamily(
            "splitveil_publication_version", "Publications of an adapter since the start.", labels=label
        )
        refusals = CounterMetricFamily("splitveil_refusals", "Queries refused, by kind.", labels=["adapter", "kind"])
        seconds = HistogramMetricFamily(
            "splitveil_answer_seconds", "From a query's arrival until its answer is ready.", labels=label
        )
        for name, one in self._adapters.items():
            with one.lock:
                queries.add_metric([name], sum(one.buckets))
                for family, value in (
                    (rows, one.rows),
                    (received, one.received_bytes),
                    (sent, one.sent_bytes),
                    (failed, one.failed),
                ):
                    family.add_metric([name], value)
                version.add_metric([name], one.version)
                for kind, count in one.refusals.items():
                    refusals.add_metric([name, kind], count)
                seconds.add_metric([name], one.cumulative(), one.seconds)
        yield from (queries, rows, received, sent, failed, version, refusals, seconds)


class AdapterMetrics:
    """The figures of one adapter."""

    __slots__ = (
        "buckets",
        "failed",
        "lock",
        "received_bytes",
        "refusals",
        "rows",
        "seconds",
        "sent_bytes",
        "version",
    )

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.buckets = [0] * (len(SECONDS) + 1)
        self.rows = self.received_bytes = self.sent_bytes = self.failed = 0
        self.seconds = 0.0
        self.version = 1
        self.refusals = dict.fromkeys(KINDS, 0)

    def answered(self, rows: int, received: int, sent: int, seconds: float) -> None:
        """A query was answered."""
        bucket = bisect_left(SECONDS, seconds)
        with self.lock:
            self.buckets[bucket] += 1
            self.rows += rows
            self.received_bytes += received
            self.sent_bytes += sent
            self.seconds += seconds

    def sent(self, size: int) -> None:
        """Bytes of a publication."""
        with self.lock:
            self.sent_bytes += size

    def refused(self, kind: str) -> None:
        """A query was refused, for one of ``KINDS``."""
        with self.lock:
            self.refusals[kind] += 1

    def published(self, version: int) -> None:
        """The adapter was published for the ``version``-th time."""
        self.version = version

    def replacement_failed(self) -> None:
        """The adapter's folder did not load, and the old one goes on."""
        with self.lock:
            self.failed += 1

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper end, answers that took at most so long), as the format wants them. The lock is held."""
        found: list[tuple[str, float]] = []
        total = 0
        for end, count in zip((*SECONDS, float("inf")), self.buckets, strict=True):
            total += count
            found.append(("+Inf" if end == float("inf") else str(end), total))
        return found
