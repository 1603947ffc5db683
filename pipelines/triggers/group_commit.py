"""Many deliveries in one transaction: whoever arrives while a commit runs shares the next one.

A commit that waits for the disk takes milliseconds; one for each delivery could not keep up with a burst.
A delivery is answered only after the commit that holds it.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from pipelines.triggers.queue import Queue
from pipelines.triggers.records import Delivery

MAX_BATCH = 256
MAX_WAITING = 10_000


class Overloaded(Exception):
    """More deliveries wait than are worth keeping in memory, or the hook is stopping."""


class GroupCommit:
    """Writes deliveries for the event loop that calls it."""

    def __init__(self, queue: Queue, *, max_batch: int = MAX_BATCH, max_waiting: int = MAX_WAITING) -> None:
        self._queue = queue
        self._max_batch = max_batch
        self._waiting: asyncio.Queue[tuple[Delivery, asyncio.Future[bool]] | None] = asyncio.Queue()
        self._max_waiting = max_waiting
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to commit."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Commit what waits, then end."""
        if self._task is not None:
            task, self._task = self._task, None
            self._waiting.put_nowait(None)
            await task
        self._thread.shutdown()

    async def record(self, delivery: Delivery) -> bool:
        """Keep ``delivery``; whether it is the first of its id.

        Raises:
            Overloaded: it was not kept.
            sqlalchemy.exc.SQLAlchemyError: it was not kept; the store is full or away.
        """
        if self._task is None or self._waiting.qsize() >= self._max_waiting:
            raise Overloaded
        kept: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((delivery, kept))
        return await kept

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        running = True
        while running:
            first = await self._waiting.get()
            batch = [] if first is None else [first]
            running = first is not None
            with suppress(asyncio.QueueEmpty):
                while len(batch) < self._max_batch:
                    following = self._waiting.get_nowait()
                    if following is None:
                        running = False
                    else:
                        batch.append(following)
            if batch:
                await self._commit(loop, batch)

    async def _commit(
        self, loop: asyncio.AbstractEventLoop, batch: list[tuple[Delivery, asyncio.Future[bool]]]
    ) -> None:
        try:
            answers = await loop.run_in_executor(self._thread, self._queue.record, [each for each, _ in batch])
        except Exception as error:  # noqa: BLE001 - raised again in each request that waits for this commit
            for _, kept in batch:
                if not kept.done():
                    kept.set_exception(error)
            return
        for (_, kept), answer in zip(batch, answers, strict=True):
            if not kept.done():  # a caller that hung up no longer waits
                kept.set_result(answer)
