"""What passes between the worker, the registry and whatever runs pipelines."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

from components._runtime.plan import Plan, RunSettings
from defense_core.config import require
from defense_core.errors import QuarantineError
from pipelines.triggers.registry import Entry


@dataclass(frozen=True)
class Order:
    """A run to be submitted.

    Attributes:
        name: the run's name, one run for each: what it is looked up by before it is created.
        plan: names the model as ``models:/name/version``.
        run: where it keeps its records and what it promotes.
    """

    name: str
    plan: Plan
    run: RunSettings


class Unsubmittable(QuarantineError):
    """The orchestrator will never take this run, however often it is asked."""


class Submitter(Protocol):
    """Whatever runs pipelines."""

    def submit(self, order: Order) -> str:
        """The id of the run called ``order.name``: of the one that is there, else of a new one.

        Raises:
            Unsubmittable: it is refused for good.
            QuarantineError: it may be taken later; with exit code 2, perhaps in a moment.
        """

    def at_work(self, name: str) -> bool:
        """Whether a run called ``name`` has not ended. Raises QuarantineError where there is no answer."""


class Registry(Protocol):
    """Whatever knows the versions."""

    def look_up(self, model: str, version: str) -> Entry | None:
        """The version now. Raises QuarantineError where there is no answer."""


@dataclass(frozen=True)
class WorkerSettings:
    """How hard the worker tries.

    Attributes:
        parallel: registry look-ups and submissions at a time.
        poll_s: wait between two looks into an empty queue.
        lease_s: how long the work of a worker that died waits for another; renewed while it lives.
        tries: attempts to submit in one go, on errors that may be over at once.
        delay_s, max_delay_s: wait before work is claimed again; doubled each time, with jitter.
        max_attempts: claims before work counts as failed and waits for the sweep.
    """

    parallel: int = 4
    poll_s: float = 0.2
    lease_s: float = 30.0
    tries: int = 3
    delay_s: float = 2.0
    max_delay_s: float = 60.0
    max_attempts: int = 1000

    def __post_init__(self) -> None:
        require(self.parallel >= 1, "parallel", "at least 1", self.parallel)
        require(self.poll_s > 0, "poll_s", "more than 0", self.poll_s)
        require(self.lease_s >= 1, "lease_s", "at least 1 second", self.lease_s)
        require(self.tries >= 1, "tries", "at least 1", self.tries)
        require(0 < self.delay_s <= self.max_delay_s, "delay_s", "more than 0, at most max_delay_s", self.delay_s)
        require(self.max_attempts >= 1, "max_attempts", "at least 1", self.max_attempts)

    def backoff_s(self, attempts: int) -> float:
        """The wait after ``attempts`` failed ones: between half and all of the doubled delay."""
        full = min(self.max_delay_s, self.delay_s * 2.0 ** min(attempts - 1, 30))
        return full * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
