"""``kill -9`` at every point of the hook's and the worker's way: nothing lost, nothing doubled."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import event as sa_event

from pipelines.triggers.group_commit import GroupCommit
from pipelines.triggers.queue import Queue
from pipelines.triggers.records import Delivery
from tests.triggers.fakes import FakeRegistry, Ledger, drain, entry, make_worker, step

VERSIONS = 5


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(work: Callable[[], None]) -> int:
    """The signal that ended ``work`` in a process of its own; 0 where it ended by itself."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(70)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed in another way"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def dying(target: object, name: str, when: str, nth: int) -> None:
    """``target.name`` kills the process at its ``nth`` call, before or after it does its work."""
    genuine, calls = getattr(target, name), [0]

    def method(*arguments, **options):
        calls[0] += 1
        own = calls[0]  # two threads call it
        if when == "before" and own == nth:
            die()
        answer = genuine(*arguments, **options)
        if when == "after" and own == nth:
            die()
        return answer

    setattr(target, name, method)


def registry() -> FakeRegistry:
    return FakeRegistry(*(entry(version=str(number)) for number in range(1, VERSIONS + 1)))


def check(folder: Path) -> None:
    """After one more worker, with leases that have lapsed: one run for each version."""
    queue, ledger = Queue.open(f"sqlite:///{folder}/queue.db"), Ledger(folder / "runs.jsonl")
    queue.clock = lambda: 4e9  # every lease has lapsed
    drain(make_worker(queue, registry(), ledger), queue)
    assert dict(ledger.models()) == {f"models:/vision-a/{number}": 1 for number in range(1, VERSIONS + 1)}
    assert queue.counts()["submitted"] == VERSIONS
    queue.close()


POINTS = [
    (part, name, when, nth)
    for part, name in (
        ("queue", "claim_hints"),
        ("registry", "look_up"),
        ("queue", "settle"),
        ("queue", "claim"),
        ("ledger", "submit"),
        ("queue", "submitted"),
    )
    for when in ("before", "after")
    for nth in ((1, 3) if name not in ("claim_hints", "claim") else (1,))
]


@pytest.mark.parametrize(("part", "name", "when", "nth"), POINTS)
def test_worker_killed_anywhere(tmp_path, part, name, when, nth):
    url = f"sqlite:///{tmp_path}/queue.db"
    queue = Queue.open(url)
    queue.record([Delivery(f"d{number}", "vision-a", str(number)) for number in range(1, VERSIONS + 1)])
    queue.close()

    def work():
        parts = {"queue": Queue.open(url), "registry": registry(), "ledger": Ledger(tmp_path / "runs.jsonl")}
        dying(parts[part], name, when, nth)
        drain(make_worker(parts["queue"], parts["registry"], parts["ledger"], parallel=2), parts["queue"])

    assert in_child(work) == signal.SIGKILL
    check(tmp_path)


@pytest.mark.parametrize("nth", range(2, 8))
def test_worker_killed_before_a_commit(tmp_path, nth):
    url = f"sqlite:///{tmp_path}/queue.db"
    queue = Queue.open(url)
    queue.record([Delivery(f"d{number}", "vision-a", str(number)) for number in range(1, VERSIONS + 1)])
    queue.close()

    def work():
        opened, commits = Queue.open(url), [0]

        @sa_event.listens_for(opened.engine, "commit")
        def commit(_):
            commits[0] += 1
            if commits[0] == nth:
                die()

        drain(make_worker(opened, registry(), Ledger(tmp_path / "runs.jsonl"), parallel=2), opened)

    assert in_child(work) == signal.SIGKILL
    check(tmp_path)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("nth", [1, 2])
def test_hook_killed_around_a_commit_keeps_what_it_answered(tmp_path, when, nth):
    url, answered = f"sqlite:///{tmp_path}/queue.db", tmp_path / "answered"

    async def serve(queue: Queue) -> None:
        writer = GroupCommit(queue, max_batch=2)
        await writer.start()

        async def one(number: int) -> None:
            await writer.record(Delivery(f"d{number}", "vision-a", str(number)))
            with open(answered, "a") as file:  # the 202 that the caller got
                file.write(f"d{number}\n")

        await asyncio.gather(*(one(number) for number in range(1, VERSIONS + 1)))

    def work():
        queue = Queue.open(url)
        dying(queue, "record", when, nth)
        asyncio.run(serve(queue))

    assert in_child(work) == signal.SIGKILL
    told = answered.read_text().split() if answered.exists() else []
    assert len(told) <= 2 * (nth - 1)
    queue = Queue.open(url)
    # The registry repeats what it got no answer to, and may repeat what it did.
    every = [Delivery(f"d{number}", "vision-a", str(number)) for number in range(1, VERSIONS + 1)]
    known = [each.delivery_id for each, new in zip(every, queue.record(every), strict=True) if not new]
    assert set(told) <= set(known)
    queue.close()
    check(tmp_path)


def test_twenty_kills_in_a_row(tmp_path):
    url = f"sqlite:///{tmp_path}/queue.db"
    queue = Queue.open(url)
    queue.record([Delivery(f"d{number}", "vision-a", str(number)) for number in range(1, VERSIONS + 1)])
    queue.close()
    for round_ in range(20):
        part, name, when, nth = POINTS[round_ % len(POINTS)]

        def work(round_=round_, part=part, name=name, when=when, nth=nth):
            queue, entries, ledger = Queue.open(url), registry(), Ledger(tmp_path / "runs.jsonl")
            queue.clock = lambda: 1e9 * (2 + round_)
            dying({"queue": queue, "registry": entries, "ledger": ledger}[part], name, when, nth)
            for _ in range(3):
                step(make_worker(queue, entries, ledger, parallel=2))

        in_child(work)
    queue = Queue.open(url)
    queue.clock = lambda: 1e12
    ledger = Ledger(tmp_path / "runs.jsonl")
    drain(make_worker(queue, registry(), ledger), queue)
    assert dict(ledger.models()) == {f"models:/vision-a/{number}": 1 for number in range(1, VERSIONS + 1)}
