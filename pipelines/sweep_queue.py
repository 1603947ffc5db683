"""From findings to work in the hook's queue."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from defense_core.errors import StorageError
from pipelines.sweep_findings import Finding
from pipelines.triggers.keys import WorkKey
from pipelines.triggers.records import FAILED, SUBMITTED, Known

if TYPE_CHECKING:
    from pipelines.triggers.queue import Queue

BATCH = 200


@dataclass
class Queued:
    """What became of the work that the findings ask for.

    Attributes:
        enqueued: new in the queue, or tried again after it had failed.
        reopened: submitted again, because the run left no decision, or one that grew too old.
        waiting: in the queue or running.
        later: left for the next sweep, because this one handed over as much as it may.
        impossible: findings that no run can settle.
        unasked: there is no queue.
    """

    enqueued: int = 0
    reopened: int = 0
    waiting: int = 0
    later: int = 0
    impossible: int = 0
    unasked: int = 0


@dataclass(frozen=True)
class Handover:
    """How one sweep hands over work.

    Attributes:
        queue: the hook's; ``None``: nothing is handed over.
        reopen_after_s: work that was submitted so long ago and left no decision is submitted again, seconds.
        max_enqueued: most that this sweep hands over; ``None``: all.
        now_s: unix seconds.
    """

    queue: Queue | None
    reopen_after_s: float
    max_enqueued: int | None
    now_s: float
    queued: Queued = field(default_factory=Queued)

    def take(self, findings: Iterable[Finding]) -> Queued:
        """Hand over the work of all ``findings``, which are read to their end whatever becomes of them.

        Raises:
            StorageError: the queue does not take it; the batches before are in it.
        """
        batch: list[Finding] = []
        for finding in findings:
            if finding.kind in ("drift", "unknown"):
                continue
            if finding.work is None:
                self.queued.impossible += 1
            elif self.queue is None:
                self.queued.unasked += 1
            else:
                batch.append(finding)
            if len(batch) == BATCH:
                self._hand_over(batch)
                batch = []
        self._hand_over(batch)
        return self.queued

    def _hand_over(self, batch: list[Finding]) -> None:
        if self.queue is None or not batch:
            return
        keys = list(dict.fromkeys(finding.work for finding in batch if finding.work is not None))
        with queue_errors():
            fresh, again = self._due(keys, self.queue.known(keys))
            due = len(fresh) + len(again)
            if self.max_enqueued is not None:
                room = max(0, self.max_enqueued - self.queued.enqueued - self.queued.reopened)
                fresh, again = fresh[:room], again[: max(0, room - len(fresh))]
            self.queued.later += due - len(fresh) - len(again)
            self.queued.waiting += len(keys) - due
            self.queued.enqueued += self.queue.enqueue(fresh)
            self.queued.reopened += self.queue.reopen(again)

    def _due(self, keys: Iterable[WorkKey], known: Mapping[WorkKey, Known]) -> tuple[list[WorkKey], list[WorkKey]]:
        """What is new or failed, and what is to be submitted again."""
        fresh, again = [], []
        for key in keys:
            found = known.get(key)
            if found is None or found.state == FAILED:
                fresh.append(key)
            # Until then its run may be at work still, also one that makes a decision anew which grew old.
            elif found.state == SUBMITTED and self.now_s - found.changed_at >= self.reopen_after_s:
                again.append(key)
        return fresh, again


@contextmanager
def queue_errors() -> Iterator[None]:
    """A queue that does not answer, as this project's error. Raises StorageError."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except SQLAlchemyError as error:
        raise StorageError(
            "cannot enqueue what the sweep found",
            expected="the hook's queue with free space",
            # The rest of the message would be the statement and its values.
            got=str(error).splitlines()[0][:300],
            hint="Check the queue, then sweep again; nothing is enqueued twice",
        ) from error
