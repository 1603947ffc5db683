"""Connections of the hook that bring no request are ended; those that do are served as long as it takes."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from pipelines.triggers import connections
from pipelines.triggers.connections import RequestInTime

WHOLE = b"GET / HTTP/1.1\r\nHost: hook\r\n\r\n"
HALF = b"GET / HTTP/1.1\r\nHost: ho"


async def slow(scope: Any, receive: Any, send: Any) -> None:
    """Answers after longer than a header may take."""
    await asyncio.sleep(3 * connections.HEADER_TIMEOUT_S)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(connections, "HEADER_TIMEOUT_S", 0.3)
    config = uvicorn.Config(slow, port=0, http=RequestInTime, lifespan="off", log_config=None, timeout_keep_alive=60)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def said(connection: socket.socket) -> bytes:
    """Everything up to the end of the connection."""
    found = b""
    while piece := connection.recv(1000):
        found += piece
    return found


@pytest.mark.parametrize("sent", [b"", HALF], ids=["silent", "half a header"])
def test_a_connection_without_a_request_is_ended(sent: bytes, port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(sent)
        assert said(connection) == b""


def test_a_request_is_answered_and_the_next_one_must_come_in_time(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(WHOLE)
        answer = connection.recv(1000)
        assert answer.startswith(b"HTTP/1.1 200")
        connection.sendall(HALF)
        assert b"HTTP" not in said(connection)
