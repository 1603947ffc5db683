"""A registry, an orchestrator and callers for the tests of the hook."""

from __future__ import annotations

import io
import json
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from defense_core.errors import RegistryUnavailable
from pipelines.triggers.keys import WorkKey
from pipelines.triggers.logs import Redactor, logger
from pipelines.triggers.metrics import Metrics
from pipelines.triggers.orders import Order, WorkerSettings
from pipelines.triggers.queue import Queue
from pipelines.triggers.registry import Entry
from pipelines.triggers.signature import sign
from pipelines.triggers.watch import Watch, parse_watch
from pipelines.triggers.worker import Worker

SECRET = "a-secret-of-the-webhook-0123456789"
WATCH = {
    "evidence": "s3://quarantine/evidence",
    "rules": [
        {
            "models": ["vision-*"],
            "register": "quarantined",
            "plan": {"clean": "s3://data/clean.npz", "policy": "standard"},
        },
        {"models": ["*"], "register": "quarantined", "plan": {"clean": "s3://data/other.npz", "policy": "strict"}},
    ],
}


def watch() -> Watch:
    return parse_watch(WATCH, beside=Path())


def event(
    model: str = "vision-a", version: str = "1", *, entity: str = "model_version", action: str = "created", **data
):
    """A body as MLflow writes it."""
    fields = {"name": model, "version": version, "source": "s3://evil/model", "run_id": None, "tags": {}, **data}
    return json.dumps(
        {"entity": entity, "action": action, "timestamp": "2026-11-21T08:00:00+00:00", "data": fields}
    ).encode()


def headers(body: bytes, delivery: str = "d-1", *, at: float | None = None, secret: str = SECRET) -> dict[str, str]:
    """MLflow's headers for ``body``."""
    moment = int(time.time() if at is None else at)
    return {
        "Content-Type": "application/json",
        "X-MLflow-Signature": sign(secret.encode(), delivery, moment, body),
        "X-MLflow-Timestamp": str(moment),
        "X-MLflow-Delivery-Id": delivery,
    }


def entry(model: str = "vision-a", version: str = "1", **fields) -> Entry:
    base = Entry(model, version, source=f"s3://models/{model}/{version}", run_id="r", creation_timestamp=1000)
    return replace(base, **fields)


class FakeRegistry:
    """Versions by name and number."""

    def __init__(self, *entries: Entry) -> None:
        self.entries = {(each.name, each.version): each for each in entries}
        self.asked: list[tuple[str, str]] = []
        self.down = False

    def look_up(self, model: str, version: str) -> Entry | None:
        self.asked.append((model, version))
        if self.down:
            raise RegistryUnavailable("no answer from the registry", expected="an answer", got="none")
        return self.entries.get((model, version))


class Ledger:
    """An orchestrator that finds runs by name, as a line each in a file: it outlives whoever writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self.errors: list[Exception] = []
        self.calls = 0
        self.unfinished: set[str] = set()

    def submit(self, order: Order) -> str:
        with self._lock:
            self.calls += 1
            if self.errors:
                raise self.errors.pop(0)
            if order.name not in self.names():
                with open(self.path, "a") as file:
                    file.write(json.dumps({"name": order.name, "model": order.plan.model}) + "\n")
            return f"run-{order.name}"

    def at_work(self, name: str) -> bool:
        return name in self.unfinished

    def names(self) -> list[str]:
        return [each["name"] for each in self._lines()]

    def models(self) -> Counter[str]:
        return Counter(each["model"] for each in self._lines())

    def _lines(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []


def quiet_log(stream: io.StringIO | None = None):
    return logger(Redactor(), stream or io.StringIO())


def make_worker(queue: Queue, registry, submitter, *, log=None, **settings) -> Worker:
    fast = {"delay_s": 0.01, "max_delay_s": 0.02, "tries": 1, "poll_s": 0.01, **settings}
    return Worker(
        queue,
        watch(),
        registry,
        submitter,
        metrics=Metrics(queue),
        log=log or quiet_log(),
        settings=WorkerSettings(**fast),
    )


def step(worker: Worker) -> int:
    """One round of each kind; how much was handled."""
    return worker.ask() + worker.submit()


def drain(worker: Worker, queue: Queue, *, rounds: int = 200) -> None:
    """Work until nothing waits."""
    for _ in range(rounds):
        step(worker)
        counts = queue.counts()
        if not counts["hints"] + counts["pending"] + counts["claimed"]:
            return
        time.sleep(0.01)
    raise AssertionError(f"still waiting: {queue.counts()}")


def key(number: int = 1, policy: str = "sha256:p") -> WorkKey:
    return WorkKey("vision-a", str(number), "sha256:s", policy)
