"""Connections that bring no request: uvicorn ends them only after a first one, and each is one of those it may have."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEADER_TIMEOUT_S = 10.0
"""How long a connection may take for the header of a request: the first, or the next one after an answer."""


class RequestInTime(AutoHTTPProtocol):  # type: ignore[valid-type,misc]
    """uvicorn's protocol, which ends a connection that sends no complete header in time."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_a_request()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait_for_a_request()

    def _wait_for_a_request(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(HEADER_TIMEOUT_S, self._end_without_request)

    def _end_without_request(self) -> None:
        # There is a cycle as soon as a header is complete; what its body may take, the application says.
        if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
            self.transport.close()
