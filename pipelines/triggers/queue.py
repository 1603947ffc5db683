"""The durable queue between whoever names a version and the worker that submits its run.

Two stages, because a delivery is only a hint::

    delivery ──record──▶ hint (model, version) ──the registry is asked──▶ work (key) ──submit──▶ run
    sweep ─────────────────────────────────────────────enqueue──────────────▲

A hint has no content beyond a name and a number. Work has an idempotency key and one of four states::

    pending ──claim──▶ claimed ──submitted──▶ submitted
       ▲                  │  │
       └──retry, lease────┘  └──fail──▶ failed ──enqueue──▶ pending

Every method is one transaction. A process that is killed leaves what the last commit said; its claims
lapse with their lease. Whoever lost a claim can no longer change the row.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, Table, delete, func, insert, or_, select, tuple_, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import OperationalError

from pipelines.triggers.keys import WorkKey
from pipelines.triggers.records import (
    CLAIMED,
    FAILED,
    HOOK,
    PENDING,
    STATES,
    SUBMITTED,
    SWEEP,
    Delivery,
    Hint,
    Known,
    Work,
)
from pipelines.triggers.tables import deliveries, fold_log, hints, open_engine, work

MAX_ERROR_CHARS = 500
_BATCH = 200

T = TypeVar("T")


class Queue:
    """See the module. Safe to share between threads and, on one database, between processes."""

    def __init__(self, engine: Engine, *, clock: Callable[[], float] = time.time) -> None:
        self.engine = engine
        self.clock = clock

    @classmethod
    def open(cls, url: str, *, clock: Callable[[], float] = time.time) -> Queue:
        """The queue at ``url``, created if it is not there. Raises ConfigError; SQLAlchemyError."""
        return cls(open_engine(url), clock=clock)

    def close(self) -> None:
        """Give back all connections."""
        self.engine.dispose()

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        try:
            with self.engine.begin() as connection:
                yield connection
        except OperationalError as error:
            if "disk is full" in str(error.orig):
                fold_log(self.engine)  # perhaps it is the log that fills the disk, and nothing else will shorten it
            raise

    # -- in --------------------------------------------------------------------------

    def record(self, batch: Sequence[Delivery]) -> list[bool]:
        """Keep deliveries, all or none; for each, whether it is the first of its id.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: nothing was kept (disk full, database away).
        """
        now, fresh = self.clock(), {each.delivery_id: each for each in reversed(batch)}
        with self._transaction() as connection:
            rows = [{"delivery_id": name, "received_at": now} for name in fresh]
            statement = _insert(connection, deliveries).on_conflict_do_nothing().returning(deliveries.c.delivery_id)
            new = set(connection.execute(statement, rows).scalars())
            named = {(each.model, each.version) for each in fresh.values() if each.delivery_id in new}
            if named:
                _remember(connection, named, now)
        answers = []
        for each in batch:
            answers.append(each.delivery_id in new)
            new.discard(each.delivery_id)  # a second copy in the same batch is a repetition
        return answers

    def enqueue(self, keys: Iterable[WorkKey], *, origin: str = SWEEP) -> int:
        """Ask for work; how much of it is new or, having failed, is tried again. The rest is there already."""
        added = 0
        for batch in _batches(keys):
            with self._transaction() as connection:
                added += self._enqueue(connection, batch, origin)
        return added

    def known(self, keys: Iterable[WorkKey]) -> dict[WorkKey, Known]:
        """The state of each of ``keys`` that the queue has, since when, and how often it was repeated."""
        found: dict[WorkKey, Known] = {}
        for batch in _batches(keys):
            by_digest = {key.digest: key for key in batch}
            with self._transaction() as connection:
                columns = select(
                    work.c.key, work.c.state, work.c.changed_at, (work.c.round - work.c.since_round).label("repeated")
                )
                rows = connection.execute(columns.where(work.c.key.in_(by_digest)))
                found |= {by_digest[row.key]: Known(row.state, row.changed_at, row.repeated) for row in rows}
        return found

    def reopen(self, keys: Iterable[WorkKey], *, renewed: bool = False) -> int:
        """Submit again what was submitted but ended without a decision; how many. Each gets a new run key.

        Args:
            renewed: there was a decision, and it is to be made anew: this is no repetition.
        """
        since = {"since_round": work.c.round + 1} if renewed else {}
        reopened = 0
        for batch in _batches(keys):
            again = (
                update(work)
                .where(work.c.key.in_([key.digest for key in batch]), work.c.state == SUBMITTED)
                .values(round=work.c.round + 1, **since, **self._fresh())
            )
            with self._transaction() as connection:
                reopened += connection.execute(again).rowcount
        return reopened

    def _enqueue(self, connection: Connection, keys: Collection[WorkKey], origin: str) -> int:
        rows = [
            {
                "key": key.digest,
                "model": key.model,
                "version": key.version,
                "source_digest": key.source_digest,
                "policy_digest": key.policy_digest,
                "origin": origin,
                "round": 0,
                **self._fresh(),
            }
            for key in keys
        ]
        insert = _insert(connection, work)
        retried = insert.on_conflict_do_update(
            index_elements=["key"], set_=self._fresh(), where=work.c.state == FAILED
        ).returning(work.c.id)
        return len(connection.execute(retried, rows).all()) if rows else 0

    def _fresh(self) -> dict[str, Any]:
        now = self.clock()
        return {
            "state": PENDING, "attempts": 0, "received_at": now, "due_at": now, "claim": "", "run_id": "", "error": "",
            "changed_at": now,
        }  # fmt: skip

    # -- hints -----------------------------------------------------------------------

    def claim_hints(self, limit: int, *, lease_s: float) -> list[Hint]:
        """Up to ``limit`` due hints, oldest first; they come back after ``lease_s`` unless settled."""
        now = self.clock()
        at = tuple_(hints.c.model, hints.c.version)
        due = select(hints.c.model, hints.c.version).where(hints.c.due_at <= now).order_by(hints.c.due_at).limit(limit)
        claimed = (
            update(hints)
            .where(at.in_(due.with_for_update(skip_locked=True)))
            .values(due_at=now + lease_s, attempts=hints.c.attempts + 1)
            .returning(hints.c.model, hints.c.version, hints.c.seen, hints.c.attempts, hints.c.received_at)
        )
        with self._transaction() as connection:
            return [Hint(**row._mapping) for row in connection.execute(claimed)]

    def settle(self, hint: Hint, keys: Collection[WorkKey]) -> int:
        """The registry answered: enqueue ``keys`` (none, if nothing is to be done) and drop the hint, at once.

        A hint that a delivery touched meanwhile stays: what the registry said may be older than it.
        """
        with self._transaction() as connection:
            added = self._enqueue(connection, keys, HOOK)
            connection.execute(delete(hints).where(*_is(hint), hints.c.seen == hint.seen))
            connection.execute(update(hints).where(*_is(hint)).values(due_at=self.clock(), attempts=0))
        return added

    def postpone(self, hint: Hint, delay_s: float) -> None:
        """The registry did not answer: ask again after ``delay_s``."""
        with self._transaction() as connection:
            connection.execute(update(hints).where(*_is(hint)).values(due_at=self.clock() + delay_s))

    # -- work ------------------------------------------------------------------------

    def claim(self, limit: int, *, lease_s: float) -> list[Work]:
        """Up to ``limit`` pieces of due work, oldest first, for ``lease_s``; lapsed claims are taken over."""
        now, token = self.clock(), secrets.token_hex(16)
        due = (
            select(work.c.id)
            .where(or_(work.c.state == PENDING, work.c.state == CLAIMED), work.c.due_at <= now)
            .order_by(work.c.due_at, work.c.id)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        claimed = (
            update(work)
            .where(work.c.id.in_(due))
            .values(state=CLAIMED, attempts=work.c.attempts + 1, due_at=now + lease_s, claim=token, changed_at=now)
            .returning(*work.c)
        )
        with self._transaction() as connection:
            rows = connection.execute(claimed).all()
        return sorted((_work(row) for row in rows), key=lambda each: each.id)

    def renew(self, claim: str, *, lease_s: float) -> int:
        """Keep what is still held under ``claim`` for another ``lease_s``; how much that is."""
        held = (work.c.claim == claim, work.c.state == CLAIMED)
        with self._transaction() as connection:
            return connection.execute(update(work).where(*held).values(due_at=self.clock() + lease_s)).rowcount

    def submitted(self, item: Work, run_id: str) -> bool:
        """The run is there; ``False`` if the claim had lapsed and somebody else holds it."""
        return self._settle(item, state=SUBMITTED, run_id=run_id, error="")

    def retry(self, item: Work, error: str, delay_s: float) -> bool:
        """Try again after ``delay_s``; ``False`` as above."""
        return self._settle(item, state=PENDING, due_at=self.clock() + delay_s, error=error[:MAX_ERROR_CHARS])

    def fail(self, item: Work, error: str) -> bool:
        """Give up until somebody asks for it again; ``False`` as above."""
        return self._settle(item, state=FAILED, error=error[:MAX_ERROR_CHARS])

    def _settle(self, item: Work, **values: Any) -> bool:
        held = (work.c.id == item.id, work.c.state == CLAIMED, work.c.claim == item.claim)
        with self._transaction() as connection:
            done = connection.execute(update(work).where(*held).values(changed_at=self.clock(), **values))
        return bool(done.rowcount)

    # -- what is there ---------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        """Rows by state, and ``hints``."""
        with self._transaction() as connection:
            rows = connection.execute(select(work.c.state, func.count()).group_by(work.c.state)).all()
            waiting = connection.execute(select(func.count()).select_from(hints)).scalar_one()
        return {**dict.fromkeys(STATES, 0), **dict(rows), "hints": waiting}

    def oldest_waiting_s(self) -> float:
        """Age of the oldest hint or unsubmitted work, seconds; 0 where nothing waits."""
        with self._transaction() as connection:
            waiting = select(func.min(work.c.received_at)).where(work.c.state.in_((PENDING, CLAIMED)))
            times = [connection.execute(each).scalar() for each in (waiting, select(func.min(hints.c.received_at)))]
        return max((self.clock() - each for each in times if each is not None), default=0.0)

    def check(self) -> None:
        """Raise SQLAlchemyError if the database cannot be written, a full disk included."""
        probe = f"probe-{secrets.token_hex(16)}"
        with self._transaction() as connection:
            connection.execute(insert(deliveries).values(delivery_id=probe, received_at=self.clock()))
            connection.execute(delete(deliveries).where(deliveries.c.delivery_id == probe))

    def purge(self, older_than_s: float, *, limit: int = 5000) -> int:
        """Forget up to ``limit`` delivery ids of more than ``older_than_s`` ago; how many."""
        old = select(deliveries.c.delivery_id).where(deliveries.c.received_at < self.clock() - older_than_s)
        with self._transaction() as connection:
            gone = connection.execute(delete(deliveries).where(deliveries.c.delivery_id.in_(old.limit(limit))))
        return int(gone.rowcount)


def _remember(connection: Connection, named: set[tuple[str, str]], now: float) -> None:
    rows = [
        {"model": model, "version": version, "seen": 1, "received_at": now, "attempts": 0, "due_at": now}
        for model, version in sorted(named)
    ]
    again = {"seen": hints.c.seen + 1, "due_at": now, "attempts": 0}
    statement = _insert(connection, hints).on_conflict_do_update(index_elements=["model", "version"], set_=again)
    connection.execute(statement, rows)


def _insert(connection: Connection, table: Table) -> Any:
    return (postgresql if connection.dialect.name == "postgresql" else sqlite).insert(table)


def _is(hint: Hint) -> tuple[Any, Any]:
    return hints.c.model == hint.model, hints.c.version == hint.version


def _work(row: Any) -> Work:
    key = WorkKey(row.model, row.version, row.source_digest, row.policy_digest)
    return Work(row.id, key, row.round, row.attempts, row.origin, row.received_at, row.claim)


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    rest = iter(items)
    while batch := list(islice(rest, _BATCH)):
        yield list(dict.fromkeys(batch))
