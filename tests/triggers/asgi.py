"""Calls to the hook over ASGI: no port, no thread of a server."""

from __future__ import annotations

import asyncio
import io
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass

from pipelines.triggers.app import PATH, HookLimits, create_app
from pipelines.triggers.signature import Verifier
from tests.triggers.fakes import SECRET, event, headers, quiet_log


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def word(self) -> str:
        return json.loads(self.body)["status"]


class Client:
    """Calls an ASGI application."""

    def __init__(self, app, log):
        self.app, self.log = app, log

    async def call(self, method="POST", path=PATH, head=None, parts=(b"",), *, caller="10.0.0.1", hang=False):
        """``parts`` are the pieces of the body; ``hang``: the last one never comes."""
        messages = [
            {"type": "http.request", "body": part, "more_body": hang or index < len(parts) - 1}
            for index, part in enumerate(parts)
        ]
        sent = []

        async def receive():
            if messages:
                return messages.pop(0)
            await asyncio.sleep(3600)
            raise AssertionError

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
            "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http",
            "client": (caller, 1234), "server": ("hook", 80),
            "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in (head or {}).items()],
        }  # fmt: skip
        await asyncio.wait_for(self.app(scope, receive, send), 20)
        start = next(message for message in sent if message["type"] == "http.response.start")
        body = b"".join(message.get("body", b"") for message in sent if message["type"] == "http.response.body")
        return Answer(start["status"], {name.decode(): value.decode() for name, value in start["headers"]}, body)

    async def deliver(self, body=None, delivery="d-1", **options):
        body = event() if body is None else body
        return await self.call(head=headers(body, delivery, **options), parts=(body,))


@asynccontextmanager
async def hook(queue, **limits):
    stream = io.StringIO()
    app = create_app(
        queue,
        Verifier(lambda: [SECRET.encode()]),
        limits=HookLimits(**{"body_timeout_s": 0.3, **limits}),
        log=quiet_log(stream),
    )
    async with app.router.lifespan_context(app):
        yield Client(app, stream)
