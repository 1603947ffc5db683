"""Prometheus metrics of the hook and of the worker, in a registry of their own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from sqlalchemy.exc import SQLAlchemyError

from pipelines.triggers.queue import Queue
from pipelines.triggers.records import STATES

SCRAPE_S = 1.0
"""The queue is counted at most this often, however many scrape."""

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SLOW = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)


class Metrics:
    """All that is counted. ``results`` and ``reasons`` are fixed words, never text of a caller."""

    def __init__(self, queue: Queue) -> None:
        self.registry = CollectorRegistry()
        self.deliveries = Counter(
            "quarantine_hook_deliveries", "Webhook calls by what became of them.", ["result"], registry=self.registry
        )
        self.answer_s = Histogram(
            "quarantine_hook_answer_seconds", "Time to answer a call.", buckets=_FAST, registry=self.registry
        )
        self.lookups = Counter(
            "quarantine_worker_lookups",
            "Versions that the registry was asked about.",
            ["result"],
            registry=self.registry,
        )
        self.submissions = Counter(
            "quarantine_worker_submissions", "Attempts to submit a run.", ["result"], registry=self.registry
        )
        self.waited_s = Histogram(
            "quarantine_worker_waited_seconds", "From the request to the run.", buckets=_SLOW, registry=self.registry
        )
        self.registry.register(QueueCollector(queue))


class QueueCollector:
    """What stands in the queue, counted when it is scraped."""

    def __init__(self, queue: Queue, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._queue = queue
        self._clock = clock
        self._lock = threading.Lock()
        self._counted_at = float("-inf")
        self._families: list[GaugeMetricFamily] = []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The gauges; ``quarantine_queue_up`` is 0, and the others are missing, while the store is away."""
        with self._lock:
            if self._clock() - self._counted_at >= SCRAPE_S:
                self._families = self._count()
                self._counted_at = self._clock()
            yield from self._families

    def describe(self) -> list[GaugeMetricFamily]:
        """Nothing, so that registering it asks no database."""
        return []

    def _count(self) -> list[GaugeMetricFamily]:
        up = GaugeMetricFamily("quarantine_queue_up", "Whether the store answers.")
        rows = GaugeMetricFamily("quarantine_queue_rows", "Work by state, and hints.", labels=["state"])
        age = GaugeMetricFamily("quarantine_queue_oldest_seconds", "Age of the oldest that waits.")
        try:
            counts, oldest_s = self._queue.counts(), self._queue.oldest_waiting_s()
        except SQLAlchemyError:
            up.add_metric([], 0)
            return [up]
        up.add_metric([], 1)
        age.add_metric([], oldest_s)
        for state in (*STATES, "hints"):
            rows.add_metric([state], counts[state])
        return [up, rows, age]
