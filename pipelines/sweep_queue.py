"""From findings to work in the hook's queue."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Literal

from defense_core.errors import StorageError
from pipelines.sweep_findings import Finding
from pipelines.triggers.keys import WorkKey
from pipelines.triggers.records import FAILED, SUBMITTED, Known

if TYPE_CHECKING:
    from pipelines.triggers.queue import Queue

BATCH = 200
MAX_ROUNDS = 5
"""So often work is submitted again. The waits double: with a day, a month in all."""
FRUITLESS = f"It was submitted {MAX_ROUNDS + 1} times and no run left a decision: look at them, then submit it by hand."

_Fate = Literal["new", "again", "renewed", "waiting", "observed", "fruitless"]


@dataclass
class Queued:
    """What became of the work that the findings ask for.

    Attributes:
        enqueued: new in the queue, or tried again after it had failed.
        reopened: submitted again, because the run left no decision, or one that grew too old.
        waiting: in the queue or running.
        observed: submitted, for a policy that only observes: its decision is in the evidence, not in the registry.
        later: left for the next sweep, because this one handed over as much as it may.
        impossible: findings that no run can settle.
        unasked: there is no queue.
    """

    enqueued: int = 0
    reopened: int = 0
    waiting: int = 0
    observed: int = 0
    later: int = 0
    impossible: int = 0
    unasked: int = 0


@dataclass(frozen=True)
class Handover:
    """How one sweep hands over work.

    Attributes:
        queue: the hook's; ``None``: nothing is handed over.
        reopen_after_s: work that was submitted so long ago and left no decision is submitted again, seconds; twice
            that after each further round, and at most :data:`MAX_ROUNDS` times.
        max_enqueued: most that this sweep hands over; ``None``: all.
        now_s: unix seconds.
        observing: digests of the policies that only observe: what was submitted for them is done.
    """

    queue: Queue | None
    reopen_after_s: float
    max_enqueued: int | None
    now_s: float
    observing: frozenset[str] = frozenset()
    queued: Queued = field(default_factory=Queued)
    _again: list[tuple[WorkKey, _Fate]] = field(default_factory=list)

    def take(self, findings: Iterable[Finding], report: Callable[[Finding], object] = lambda _: None) -> Queued:
        """Hand over the work of all ``findings``, which are read to their end whatever becomes of them.

        What is new goes before what is submitted again.

        Args:
            report: called with each finding that stands after the queue was asked.

        Raises:
            StorageError: the queue does not take it; the batches before are in it.
        """
        rest = iter(findings)
        while batch := list(islice(rest, BATCH)):
            fates = self._hand_over([each for each in batch if each.work is not None])
            for finding in batch:
                if self._stands(finding, fates):
                    report(_settled(finding, fates))
        self._reopen()
        return self.queued

    def _hand_over(self, findings: Sequence[Finding]) -> dict[WorkKey, _Fate]:
        """Enqueue what is new, note what is due again, and say what becomes of all of it."""
        if self.queue is None:
            return {}
        by_key = {finding.work: finding for finding in findings if finding.work is not None}
        with queue_errors():
            known = self.queue.known(by_key)
            fates = {key: self._fate(finding, known.get(key)) for key, finding in by_key.items()}
            due = [key for key, fate in fates.items() if fate == "new"]
            fresh = due[: self._room()]
            self.queued.enqueued += self.queue.enqueue(fresh)
        again = [(key, fate) for key, fate in fates.items() if fate in ("again", "renewed")]
        self.queued.later += len(due) - len(fresh) + len(again)
        room = self._room()
        self._again.extend(again if room is None else again[: max(0, room - len(self._again))])
        if room is None:
            self._reopen()
        return fates

    def _reopen(self) -> None:
        """Submit again what is due, as far as there is room behind all that is new."""
        again = self._again[: self._room()]
        self._again.clear()
        if self.queue is None or not again:
            return
        with queue_errors():
            for fate in ("again", "renewed"):
                keys = [key for key, each in again if each == fate]
                self.queued.reopened += self.queue.reopen(keys, renewed=fate == "renewed")
        self.queued.later -= len(again)

    def _room(self) -> int | None:
        """How much more new work this sweep may hand over; ``None``: all."""
        return None if self.max_enqueued is None else max(0, self.max_enqueued - self.queued.enqueued)

    def _fate(self, finding: Finding, known: Known | None) -> _Fate:
        if known is None or known.state == FAILED:
            return "new"
        if known.state != SUBMITTED:
            return "waiting"
        if finding.work is not None and finding.work.policy_digest in self.observing:
            return "observed"
        renewed = finding.old_since_s is not None and known.changed_at < finding.old_since_s
        repeated = 0 if renewed else known.repeated
        last = repeated >= MAX_ROUNDS
        # Until then its run may be at work still, also one that makes a decision anew which grew old.
        if self.now_s - known.changed_at < self.reopen_after_s * (1 if last else 2**repeated):
            return "waiting"
        if renewed:
            return "renewed"
        return "fruitless" if last else "again"

    def _stands(self, finding: Finding, fates: Mapping[WorkKey, _Fate]) -> bool:
        """Count what becomes of ``finding``; whether it is one still."""
        if finding.kind in ("drift", "unknown"):
            return True
        fate = None if finding.work is None else fates.get(finding.work)
        self.queued.impossible += finding.work is None or fate == "fruitless"
        self.queued.unasked += finding.work is not None and self.queue is None
        self.queued.waiting += fate == "waiting"
        self.queued.observed += fate == "observed"
        return fate != "observed"


def _settled(finding: Finding, fates: Mapping[WorkKey, _Fate]) -> Finding:
    """``finding``, or that no run settles it."""
    if finding.work is None or fates.get(finding.work) != "fruitless":
        return finding
    return replace(finding, kind="fruitless", why=f"{finding.why} {FRUITLESS}")


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
