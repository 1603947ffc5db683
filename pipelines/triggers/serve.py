"""The processes: the hook's server, with a worker beside it or without, and the worker alone."""

from __future__ import annotations

import asyncio
import logging
import signal
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from prometheus_client import start_http_server
from sqlalchemy.exc import SQLAlchemyError

from defense_core.errors import ConfigError, StorageError
from pipelines.triggers.app import Hook, HookLimits, create_app
from pipelines.triggers.connections import RequestInTime
from pipelines.triggers.logs import ForwardedRecords
from pipelines.triggers.metrics import Metrics
from pipelines.triggers.orders import Registry, Submitter, WorkerSettings
from pipelines.triggers.queue import Queue
from pipelines.triggers.secret_files import Secrets
from pipelines.triggers.signature import Verifier
from pipelines.triggers.tables import open_engine
from pipelines.triggers.watch import Watch
from pipelines.triggers.worker import Worker

GRACE_S = 20
MAX_CONNECTIONS = 2000


@dataclass(frozen=True)
class Listen:
    """Where the server listens.

    Attributes:
        tls_certificate, tls_key: PEM files; ``None``: plain HTTP, for a proxy that ends TLS before it.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    tls_certificate: Path | None = None
    tls_key: Path | None = None


@dataclass(frozen=True)
class Work:
    """What a worker needs."""

    watch: Watch
    registry: Registry
    submitter: Submitter
    settings: WorkerSettings


def serve(
    queue_url: str, secrets: Secrets, listen: Listen, limits: HookLimits, *, log: Any, work: Work | None = None
) -> None:
    """Serve until SIGTERM or SIGINT; deliveries that were read are kept and answered first.

    Args:
        work: a worker in the same process, ``None``: none.

    Raises:
        StorageError: the queue cannot be opened.
        ConfigError: certificate or key cannot be used.
    """
    _require_certificate(listen)
    with open_queue(queue_url) as queue, forwarded(log):
        config_of: dict[str, Any] = {}
        beside = None if work is None else _beside(queue_url, work, log, lambda: config_of["server"])
        app = create_app(queue, Verifier(secrets, window_s=limits.window_s), limits=limits, log=log, beside=beside)
        config = uvicorn.Config(
            app,
            host=listen.host,
            port=listen.port,
            ssl_certfile=listen.tls_certificate,
            ssl_keyfile=listen.tls_key,
            log_config=None,
            access_log=False,
            server_header=False,
            # A header that anybody can send must not say who called.
            proxy_headers=False,
            http=RequestInTime,
            ws="none",
            lifespan="on",
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=GRACE_S,
        )
        server = config_of["server"] = uvicorn.Server(config)
        for number in (signal.SIGTERM, signal.SIGINT):
            # uvicorn handles these while it runs, and raises them again once it has stopped.
            signal.signal(number, lambda *_: None)
        log.info("hook starts", host=listen.host, port=listen.port, worker=work is not None)
        server.run()
        log.info("hook stopped")


def _require_certificate(listen: Listen) -> None:
    if listen.tls_certificate is None:
        return
    try:
        # The same question that uvicorn asks, which ends with a traceback.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(listen.tls_certificate, listen.tls_key, _no_password)
    except OSError as error:
        raise ConfigError(
            "the TLS certificate or its key cannot be used",
            expected="two readable PEM files that belong together, the key without a password",
            got=error.strerror or str(error),
            hint="Check --tls-certificate and --tls-key",
        ) from error


def _no_password() -> str:
    return ""


def run_worker(queue_url: str, work: Work, *, log: Any, host: str = "127.0.0.1", metrics_port: int = 0) -> None:
    """Work until SIGTERM or SIGINT.

    Raises:
        StorageError: the queue cannot be opened.
        ConfigError: the port of the metrics cannot be had.
    """
    stop = threading.Event()
    with open_queue(queue_url, durable=False) as queue, forwarded(log):
        metrics = Metrics(queue)
        if metrics_port:
            _serve_metrics(metrics, host, metrics_port)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        make_worker(queue, work, metrics, log).run(stop)


def _serve_metrics(metrics: Metrics, host: str, port: int) -> None:
    try:
        start_http_server(port, host, registry=metrics.registry)
    except OSError as error:
        raise ConfigError(
            "the worker's metrics cannot be served",
            expected="a free port at an address of this machine",
            got=f"{host}:{port}: {error.strerror or error}",
            hint="Choose another --metrics-port or --host",
        ) from error


def make_worker(queue: Queue, work: Work, metrics: Metrics, log: Any) -> Worker:
    """A worker on ``queue``."""
    return Worker(queue, work.watch, work.registry, work.submitter, metrics=metrics, log=log, settings=work.settings)


@contextmanager
def open_queue(url: str, *, durable: bool = True) -> Iterator[Queue]:
    """The queue at ``url``, closed at the end.

    Args:
        durable: wait for the disk at each commit. A worker need not: what it forgets it does again.

    Raises:
        ConfigError: the address is not usable.
        StorageError: the database does not answer, or its disk is full.
    """
    try:
        engine = open_engine(url, durable=durable)
    except SQLAlchemyError as error:
        raise StorageError(
            "cannot open the queue",
            expected="a database that answers and can be written",
            got=str(getattr(error, "orig", None) or type(error).__name__).splitlines()[0],
            hint="Check --queue, its folder, its permissions and its disk",
        ) from None  # SQLAlchemy's own message may hold the address with its password
    queue = Queue(engine)
    try:
        yield queue
    finally:
        queue.close()


@contextmanager
def forwarded(log: Any) -> Iterator[None]:
    """While open, what other libraries log goes the same way, redacted."""
    handler, root = ForwardedRecords(log), logging.getLogger()
    before, root.handlers = root.handlers, [handler]
    try:
        yield
    finally:
        root.handlers = before


def _beside(queue_url: str, work: Work, log: Any, server: Callable[[], uvicorn.Server]) -> Callable[[Hook], Any]:
    @asynccontextmanager
    async def beside(hook: Hook) -> AsyncIterator[None]:
        stop = threading.Event()

        def run() -> None:
            try:
                with open_queue(queue_url, durable=False) as queue:
                    make_worker(queue, work, hook.metrics, log).run(stop)
            except Exception:
                log.exception("the worker ended; the server stops, so that somebody notices")
                server().should_exit = True

        thread = threading.Thread(target=run, name="worker")
        thread.start()
        try:
            yield
        finally:
            stop.set()
            await asyncio.to_thread(thread.join)

    return beside
