"""Turns hints into work and work into runs. May be killed anywhere: what it did is done again to the same end.

=====================================  ==========================================================
killed                                 what is left, and what follows
=====================================  ==========================================================
before a hint is settled               the hint; the registry is asked again
after it is settled                    pending work; it is claimed
between claim and submission           claimed work; the claim lapses, it is claimed again
between submission and its record      the same; the run is found by its key and not made twice
=====================================  ==========================================================
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

from sqlalchemy.exc import SQLAlchemyError
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from defense_core.errors import EXIT_UNKNOWN, QuarantineError
from pipelines.triggers.keys import WorkKey
from pipelines.triggers.metrics import Metrics
from pipelines.triggers.orders import Order, Registry, Submitter, Unsubmittable, WorkerSettings
from pipelines.triggers.queue import Queue
from pipelines.triggers.records import Hint, Work
from pipelines.triggers.registry import FAILED, READY
from pipelines.triggers.watch import Watch, run_name

FRESH_S = 5.0
"""The registry is asked once more about work that waited longer than this."""
HINT_LEASE_S = 60.0
REGISTERING_MAX_S = 86400.0
"""A version that is not ready so long after it was first named is left to the sweep."""
FORMER_S = 300.0
"""Between two looks whether the run of the round before has ended."""
STORE_AWAY_S = 1.0


class Worker:
    """See the module. One worker uses ``settings.parallel`` threads; several workers may share one queue."""

    def __init__(
        self,
        queue: Queue,
        watch: Watch,
        registry: Registry,
        submitter: Submitter,
        *,
        metrics: Metrics,
        log: Any,
        settings: WorkerSettings | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.queue = queue
        self.watch = watch
        self.registry = registry
        self.submitter = submitter
        self.metrics = metrics
        self.log = log
        self.settings = settings or WorkerSettings()
        self._monotonic = monotonic
        self._held_until = 0.0
        self._askers = ThreadPoolExecutor(self.settings.parallel, thread_name_prefix="ask")
        self._submitters = ThreadPoolExecutor(self.settings.parallel, thread_name_prefix="submit")
        self._more_work = threading.Event()

    def run(self, stop: threading.Event) -> None:
        """Work until ``stop`` is set; what has begun is finished first."""
        self.log.info("worker starts", rules=len(self.watch.rules))
        # Side by side, so that a slow orchestrator delays no look-up and a slow registry no submission.
        with ThreadPoolExecutor(2, thread_name_prefix="loop") as loops:
            ends = [
                loops.submit(self._loop, self.ask, stop, threading.Event()),
                loops.submit(self._loop, self.submit, stop, self._more_work),
            ]
            try:
                wait(ends, return_when=FIRST_EXCEPTION)
            finally:
                stop.set()
                self._more_work.set()
        for pool in (self._askers, self._submitters):
            pool.shutdown()
        for end in ends:
            end.result()
        self.log.info("worker stopped")

    def _loop(self, step: Callable[[], int], stop: threading.Event, wake: threading.Event) -> None:
        while not stop.is_set():
            try:
                if not step():
                    wake.wait(self.settings.poll_s)
                    wake.clear()
            except SQLAlchemyError as error:
                self.log.warning("store does not answer", why=type(error).__name__)
                stop.wait(STORE_AWAY_S)

    def ask(self) -> int:
        """Ask the registry about hints that are due, at most a few; how many. Raises SQLAlchemyError."""
        hints = self.queue.claim_hints(2 * self.settings.parallel, lease_s=HINT_LEASE_S)
        list(self._askers.map(self._guarded(self._ask), hints))
        return len(hints)

    def submit(self) -> int:
        """Submit work that is due, at most a few pieces; how many. Raises SQLAlchemyError."""
        asked_at = self._monotonic()
        items = self.queue.claim(2 * self.settings.parallel, lease_s=self.settings.lease_s)
        if items:
            self._held_until = asked_at + self.settings.lease_s
            done = threading.Event()
            renewing = threading.Thread(target=self._renew, args=(items[0].claim, done), name="lease")
            renewing.start()
            try:
                list(self._submitters.map(self._guarded(self._submit), items))
            finally:
                done.set()
                renewing.join()
        return len(items)

    def _guarded(self, handle: Callable[[Any], None]) -> Callable[[Any], None]:
        """``handle``, whose failure for one piece leaves the others alone; its claim lapses and it comes again."""

        def guarded(each: Hint | Work) -> None:
            try:
                handle(each)
            except SQLAlchemyError as error:
                self.log.warning("not recorded; it will be done again", why=type(error).__name__)
            except Exception:
                self.log.exception("not handled; it will be tried again")

        return guarded

    def _renew(self, claim: str, done: threading.Event) -> None:
        while not done.wait(self.settings.lease_s / 3):
            asked_at = self._monotonic()
            try:
                self.queue.renew(claim, lease_s=self.settings.lease_s)
                self._held_until = asked_at + self.settings.lease_s
            except SQLAlchemyError as error:
                self.log.warning("lease not renewed", why=type(error).__name__)

    # -- hints -----------------------------------------------------------------------

    def _ask(self, hint: Hint) -> None:
        try:
            entry = self.registry.look_up(hint.model, hint.version)
        except QuarantineError as error:
            self._looked_up("unavailable", hint.model, hint.version, why=str(error), attempts=hint.attempts)
            self.queue.postpone(hint, self.settings.backoff_s(hint.attempts))
            return
        if entry is not None and entry.status == FAILED:
            self.queue.settle(hint, [])  # it will never be ready
            self._looked_up("failed", hint.model, hint.version, status=entry.status)
            return
        if entry is not None and entry.status != READY:
            self._not_ready(hint, entry.status)
            return
        found = "absent" if entry is None else self.watch.key(entry)
        added = self.queue.settle(hint, [found] if isinstance(found, WorkKey) else [])
        result = found if isinstance(found, str) else "new" if added else "known"
        self._more_work.set()
        self._looked_up(result, hint.model, hint.version)

    def _not_ready(self, hint: Hint, status: str) -> None:
        if self.queue.clock() - hint.received_at >= REGISTERING_MAX_S:
            self.queue.settle(hint, [])
            self._looked_up("never_ready", hint.model, hint.version, status=status)
        else:
            self.queue.postpone(hint, self.settings.backoff_s(hint.attempts))
            self._looked_up("registering", hint.model, hint.version, status=status)

    def _looked_up(self, result: str, model: str, version: str, **facts: Any) -> None:
        self.metrics.lookups.labels(result).inc()
        self.log.info("registry asked", result=result, model=model, version=version, **facts)

    # -- work ------------------------------------------------------------------------

    def _submit(self, item: Work) -> None:
        facts = {"model": item.key.model, "version": item.key.version, "attempt": item.attempts}
        try:
            if self._outdated(item):
                self._finished("outdated", facts)
                return
            if self._overtakes(item):
                self.queue.retry(item, "the run of the round before has not ended", FORMER_S)
                self._finished("waits_for_former", facts)
                return
            run_id = self._submitted(item)
        except QuarantineError as error:
            self._failed(item, error, facts)
            return
        if run_id is None:
            self._finished("lease_lost", facts)
        elif self.queue.submitted(item, run_id):
            self.metrics.waited_s.observe(max(0.0, self.queue.clock() - item.received_at))
            self._finished("submitted", facts, run=run_id)

    def _outdated(self, item: Work) -> bool:
        """Whether the registry or the rules changed since this was asked for; if so it is replaced by what they say."""
        plan_stands = self.watch.plan(item.key) is not None
        if plan_stands and self.queue.clock() - item.received_at < FRESH_S:
            return False
        entry = self.registry.look_up(item.key.model, item.key.version)
        found = None if entry is None else self.watch.key(entry)
        if found == item.key:
            return False
        if isinstance(found, WorkKey):
            self.queue.enqueue([found], origin=item.origin)
        self.queue.fail(item, "the version is gone" if found is None else "the registry or the rules changed")
        return True

    def _overtakes(self, item: Work) -> bool:
        """Whether the run of the round before is at work still: two of one version would come between each other."""
        former = item.former_run_key
        return bool(former) and self.submitter.at_work(run_name(item.key, former))

    def _submitted(self, item: Work) -> str | None:
        """The run's id; ``None`` where the lease ran out before anything was asked of the orchestrator."""
        plan, run = self.watch.plan(item.key), self.watch.run_settings(item.key)
        if plan is None or run is None:
            raise Unsubmittable(f"no rule for {item.key.model}", expected="a rule with the same policy", got="none")
        order = Order(run_name(item.key, item.run_key), plan, run)
        attempts = Retrying(
            stop=stop_after_attempt(self.settings.tries),
            wait=wait_random_exponential(multiplier=0.2, max=2.0),
            retry=retry_if_exception(_may_be_over_at_once),
            retry_error_callback=_raise_last,
        )
        for attempt in attempts:
            with attempt:
                if self._monotonic() >= self._held_until:
                    return None
                return self.submitter.submit(order)
        raise AssertionError("tenacity returns or raises")

    def _failed(self, item: Work, error: QuarantineError, facts: dict[str, Any]) -> None:
        hopeless = isinstance(error, Unsubmittable) or item.attempts >= self.settings.max_attempts
        if hopeless:
            self.queue.fail(item, str(error))
        else:
            self.queue.retry(item, str(error), self.settings.backoff_s(item.attempts))
        self._finished("failed" if hopeless else "postponed", facts, why=str(error))

    def _finished(self, result: str, facts: dict[str, Any], **more: Any) -> None:
        self.metrics.submissions.labels(result).inc()
        self.log.info("submission", result=result, **facts, **more)


def _may_be_over_at_once(error: BaseException) -> bool:
    return isinstance(error, QuarantineError) and error.exit_code == EXIT_UNKNOWN


def _raise_last(state: RetryCallState) -> None:
    if state.outcome is not None:
        state.outcome.result()
