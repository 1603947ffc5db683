"""The webhook's HTTP face: authenticate, write down, answer. Nothing else happens in a request.

======  =====================================================================================
answer  when
======  =====================================================================================
202     the delivery is on disk
200     the delivery is genuine and its event asks for nothing
400     it is genuine and malformed
401     it is unsigned, forged or outside the timestamp window
408     the body did not come in time
409     its id was accepted before; nothing was done again
413     the body is larger than the limit
429     too many calls from this address
503     the store is full or away, or too many wait; MLflow repeats the delivery
======  =====================================================================================
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from defense_core import __version__
from pipelines.triggers.group_commit import GroupCommit, Overloaded
from pipelines.triggers.metrics import Metrics
from pipelines.triggers.payload import Malformed, parse_notice
from pipelines.triggers.queue import Queue
from pipelines.triggers.rate import RateLimit
from pipelines.triggers.records import Delivery
from pipelines.triggers.signature import NotAuthentic, Verifier

PATH = "/webhooks/mlflow"
PURGE_S = 60.0
CHECK_S = 1.0


@dataclass(frozen=True)
class HookLimits:
    """What a caller may cost.

    Attributes:
        max_body_bytes: largest body. MLflow's largest events hold a description and tags.
        body_timeout_s: longest time for a body to come.
        rate_per_s, burst: calls by one address; 0: no limit.
        retry_after_s: what a 503 asks MLflow to wait before its next attempt; it makes three.
        window_s: how far a timestamp may be from now.
    """

    max_body_bytes: int = 256 * 1024
    body_timeout_s: float = 10.0
    rate_per_s: float = 2000.0
    burst: int = 4000
    retry_after_s: int = 10
    window_s: float = 300.0

    @property
    def remembered_s(self) -> float:
        """How long an accepted id is kept: as long as its timestamp could still be in the window, and a minute."""
        return 2 * self.window_s + 60


class Refusal(Exception):
    """An answer that is not acceptance; ``result`` is the word for the metrics."""

    def __init__(self, status: int, result: str, *, retry_after_s: int = 0) -> None:
        self.status = status
        self.result = result
        self.retry_after_s = retry_after_s
        super().__init__(result)


class Hook:
    """State of one server: see :func:`create_app`."""

    def __init__(self, queue: Queue, verifier: Verifier, limits: HookLimits, log: Any) -> None:
        self.queue = queue
        self.verifier = verifier
        self.limits = limits
        self.log = log
        self.metrics = Metrics(queue)
        self.writer = GroupCommit(queue)
        self.rate = RateLimit(limits.rate_per_s, limits.burst)
        self._notes = RateLimit(1.0, 10)
        self._ready: tuple[float, bool] = (float("-inf"), False)

    async def receive(self, request: Request) -> str:
        """What became of a delivery, ``accepted`` or ``ignored``. Raises Refusal."""
        caller = request.client.host if request.client else ""
        if not self.rate.allows(caller):
            raise Refusal(429, "rate_limited", retry_after_s=1)
        try:
            envelope = self.verifier.envelope(request.headers)
            body = await self._body(request)
            self.verifier.verify(envelope, body)
        except NotAuthentic as error:
            raise Refusal(401, error.reason) from error
        try:
            notice = parse_notice(body)
        except Malformed as error:
            raise Refusal(400, "malformed_body") from error
        if notice is None:
            return "ignored"
        try:
            new = await self.writer.record(Delivery(envelope.delivery_id, notice.model, notice.version))
        except (SQLAlchemyError, Overloaded) as error:
            self.log.warning("delivery not kept", delivery=envelope.delivery_id, why=type(error).__name__)
            raise Refusal(503, "not_kept", retry_after_s=self.limits.retry_after_s) from error
        if not new:
            raise Refusal(409, "duplicate")
        self.log.info("delivery", delivery=envelope.delivery_id, model=notice.model, version=notice.version)
        return "accepted"

    def note(self, request: Request, refusal: Refusal) -> None:
        """Log a refusal, of each kind one a second: a flood of forged calls must not fill the disk with lines."""
        if self._notes.allows(refusal.result):
            caller = request.client.host if request.client else ""
            self.log.warning("refused", result=refusal.result, status=refusal.status, caller=caller)

    async def _body(self, request: Request) -> bytes:
        """The raw body, given up as soon as it is too large, too slow or cut off."""
        declared = request.headers.get("content-length", "0")
        if not (declared.isascii() and declared.isdigit()) or int(declared[:20]) > self.limits.max_body_bytes:
            raise Refusal(413, "too_large")
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_timeout_s):
                async for part in request.stream():
                    size += len(part)
                    if size > self.limits.max_body_bytes:
                        raise Refusal(413, "too_large")
                    parts.append(part)
        except TimeoutError as error:
            raise Refusal(408, "too_slow") from error
        except ClientDisconnect as error:
            raise Refusal(400, "cut_off") from error
        return b"".join(parts)

    async def ready(self) -> bool:
        """Whether a delivery could be kept now; the store is asked at most once a second."""
        asked_at, answer = self._ready
        if time.monotonic() - asked_at < CHECK_S:
            return answer
        self._ready = (time.monotonic(), answer)
        try:
            await run_in_threadpool(self.queue.check)
            answer = True
        except SQLAlchemyError as error:
            self.log.warning("store does not answer", why=type(error).__name__)
            answer = False
        self._ready = (time.monotonic(), answer)
        return answer

    async def forget(self) -> None:
        """Drop ids that no replay could use any more, for ever."""
        while True:
            try:
                while await run_in_threadpool(self.queue.purge, self.limits.remembered_s):
                    await asyncio.sleep(0.05)  # in small pieces: a commit of deliveries waits for no long deletion
            except SQLAlchemyError as error:
                self.log.warning("old delivery ids not dropped", why=type(error).__name__)
            await asyncio.sleep(PURGE_S)


def create_app(
    queue: Queue,
    verifier: Verifier,
    *,
    limits: HookLimits | None = None,
    log: Any,
    beside: Callable[[Hook], AbstractAsyncContextManager[None]] | None = None,
) -> FastAPI:
    """The hook as an ASGI application.

    Args:
        beside: entered while the application runs: a worker in the same process.
    """
    hook = Hook(queue, verifier, limits or HookLimits(), log)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await hook.writer.start()
        forgetting = asyncio.create_task(hook.forget())
        try:
            if beside is None:
                yield
            else:
                async with beside(hook):
                    yield
        finally:
            forgetting.cancel()
            await hook.writer.stop()

    app = FastAPI(title="Model Quarantine hook", version=__version__, lifespan=lifespan, openapi_url=None)
    app.state.hook = hook
    _add_routes(app, hook)
    return app


def _add_routes(app: FastAPI, hook: Hook) -> None:
    @app.post(PATH, status_code=202, response_class=JSONResponse, openapi_extra=_DESCRIPTION)
    async def receive(request: Request) -> Response:
        """One delivery of MLflow's."""
        started = time.perf_counter()
        answer: Response
        try:
            result = await hook.receive(request)
            answer = _RESULTS[result]
        except Refusal as refusal:
            result, answer = refusal.result, _refused(refusal)
            hook.note(request, refusal)
        hook.metrics.deliveries.labels(result).inc()
        hook.metrics.answer_s.observe(time.perf_counter() - started)
        return answer

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process runs."""
        return {"status": "ok", "version": __version__}

    @app.get("/readyz")
    async def readyz() -> Response:
        """Deliveries can be kept."""
        ready = await hook.ready()
        return JSONResponse({"status": "ready" if ready else "store away"}, 200 if ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus metrics."""
        text = await run_in_threadpool(generate_latest, hook.metrics.registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)


def _refused(refusal: Refusal) -> Response:
    headers = {"Retry-After": str(refusal.retry_after_s)} if refusal.retry_after_s else {}
    if refusal.status in (408, 413):
        headers["Connection"] = "close"  # the rest of the body is not read
    # Callers that prove nothing learn nothing: one word for every way of not being authentic.
    word = "not authentic" if refusal.status == 401 else refusal.result
    return JSONResponse({"status": word}, refusal.status, headers)


_RESULTS = {
    "accepted": JSONResponse({"status": "accepted"}, 202),
    "ignored": JSONResponse({"status": "ignored"}, 200),
}

_DESCRIPTION: dict[str, Any] = {
    "parameters": [
        {"name": name, "in": "header", "required": True, "schema": {"type": "string"}}
        for name in ("X-MLflow-Signature", "X-MLflow-Timestamp", "X-MLflow-Delivery-Id")
    ],
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["entity", "action", "data"],
                    "properties": {
                        "entity": {"type": "string"},
                        "action": {"type": "string"},
                        "timestamp": {"type": "string"},
                        "data": {"type": "object"},
                    },
                }
            }
        },
    },
    "responses": {
        str(code): {"description": what}
        for code, what in (
            (200, "nothing to be done"),
            (202, "kept"),
            (400, "malformed"),
            (401, "not authentic"),
            (408, "too slow"),
            (409, "known already"),
            (413, "too large"),
            (429, "too many"),
            (503, "not kept; repeat"),
        )
    },
}
