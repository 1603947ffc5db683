"""The HTTP side: a real server on loopback that checks every request and every answer against the API."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from tests.pipelines.kfp_server import openapi
from tests.pipelines.kfp_server.cluster import Cluster
from tests.pipelines.kfp_server.dex import Dex, Page
from tests.pipelines.kfp_server.modes import Refused

PREFIXES = ("/api/v1/namespaces/kubeflow/services/ml-pipeline:http/proxy", "/pipeline")
"""Below which the API is served too: the Kubernetes API server's proxy, and Kubeflow's gateway."""


class KfpServer:
    """A KFP v2 API on ``http://127.0.0.1:<port>``; a context manager.

    Attributes:
        cluster: what it knows; ``cluster.modes`` says how it behaves.
    """

    def __init__(self, port: int = 0, *, certificate: tuple[Path, Path] | None = None) -> None:
        self.cluster = Cluster()
        self.dex = Dex()
        self._certificate = certificate
        self._connections: set[socket.socket] = set()
        self._http: _Http | None = None
        self._thread: threading.Thread | None = None
        self.port = port

    @property
    def endpoint(self) -> str:
        """The address."""
        return f"{'https' if self._certificate else 'http'}://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen."""
        self._http = _Http(self, self._connections, self.port)
        self.port = self._http.server_address[1]
        if self._certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*map(str, self._certificate))
            self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop listening and drop every connection; what it knows stays."""
        if self._http is None or self._thread is None:
            return
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        for connection in list(self._connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        self._http = None

    def refuse(self, seconds: float) -> None:
        """Refuse connections for some time, then listen again on the same port."""
        self.stop()
        time.sleep(seconds)
        self.start()

    def __enter__(self) -> KfpServer:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, owner: KfpServer, connections: set[socket.socket], port: int) -> None:
        self.owner = owner
        self.connections = connections
        super().__init__(("127.0.0.1", port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, or a failed handshake, is what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Http

    def log_message(self, *arguments: Any) -> None:
        """Nothing: the tests read what the cluster knows."""

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        path = "/" + parts.path.lstrip("/")
        for prefix in PREFIXES:
            if path.startswith(prefix + "/"):
                path = "/" + path.removeprefix(prefix).lstrip("/")
        if path.startswith("/admin/"):
            self._administer(path, body)
        elif not self._stopped_at_the_door(path, body):
            self._operate(path, dict(parse_qsl(parts.query, keep_blank_values=True)), body)

    do_GET = do_POST = do_DELETE = do_PATCH = _serve

    def _stopped_at_the_door(self, path: str, body: bytes) -> bool:
        """Whether the request got its answer before the API: down, not logged in, something else altogether."""
        modes, dex = self.server.owner.cluster.modes, self.server.owner.dex
        if modes.down:
            self._send(503, b"upstream connect error", "text/plain")
        elif modes.speaks == "html":
            self._send(200, b"<html><title>Kubeflow</title></html>", "text/html")
        elif modes.speaks == "v1":
            self._send(404, b"404 page not found", "text/plain")
        elif modes.token and self.headers.get("Authorization") != f"Bearer {modes.token}":
            self._error(Refused(401, 16, "Request header error: there is no user identity header."))
        elif modes.forbidden:
            self._error(Refused(403, 7, "User cannot create runs in this namespace"))
        elif modes.dex is not None:
            fields = dict(parse_qsl(body.decode(errors="replace"), keep_blank_values=True))
            page = dex.page(self.command, self.path, fields, modes.dex)
            if page is None and not dex.knows(self.headers.get("Cookie", "")):
                page = dex.to_login(path, f"http://localhost:{self.server.owner.port}" if modes.dex_elsewhere else "")
            if page is None:
                return False
            self._send_page(page)
        else:
            return False
        return True

    def _operate(self, path: str, query: dict[str, str], body: bytes) -> None:
        cluster = self.server.owner.cluster
        found = openapi.find(self.command, path)
        if found is None:
            cluster.violations.append(f"{self.command} {path} is no operation of the API")
            self._error(Refused(404, 5, "Not Found"))
            return
        operation, named = found
        try:
            content = self._content(operation, query, body)
            if _counted_down(cluster.modes.fail, operation.name):
                raise Refused(503, 14, "the database does not answer")
            answer = cluster.answer(operation.name, named, query, content)
            wrong = openapi.problems(answer, operation.answer)
            if wrong:
                cluster.violations.append(f"answer of {operation.name}: {'; '.join(wrong)}")
                raise Refused(500, 13, "the answer is not one of the API")
        except Refused as refused:
            self._error(refused)
            return
        time.sleep(cluster.modes.delay_s)
        if _counted_down(cluster.modes.lose, operation.name):
            self._drop()
            return
        self._send(200, json.dumps(answer).encode(), "application/json")

    def _content(self, operation: openapi.Operation, query: dict[str, str], body: bytes) -> Any:
        """The checked body. A request that the API does not describe is refused, and remembered as a violation."""
        wrong = openapi.query_problems(operation, query)
        content: Any = None
        if operation.upload:
            content = _uploaded(self.headers.get("Content-Type", ""), body)
            wrong += [] if content is not None else ["the body is no form with the file uploadfile"]
        elif operation.body:
            try:
                content = json.loads(body)
                wrong += openapi.problems(content, operation.body)
            except ValueError as error:
                wrong.append(f"the body is no JSON: {error}")
        elif body:
            wrong.append("a body, where the API has none")
        if wrong:
            self.server.owner.cluster.violations.append(f"request {operation.name}: {'; '.join(wrong)}")
            raise Refused(400, 3, "; ".join(wrong))
        return content

    def _administer(self, path: str, body: bytes) -> None:
        owner = self.server.owner
        if path == "/admin/runs":
            self._send(200, json.dumps(owner.cluster.report()).encode(), "application/json")
        elif path == "/admin/modes":
            for name, value in json.loads(body).items():
                if not hasattr(owner.cluster.modes, name):
                    raise KeyError(name)
                setattr(owner.cluster.modes, name, tuple(value) if isinstance(value, list) else value)
            self._send(200, b"{}", "application/json")
        elif path == "/admin/refuse":
            self._send(200, b"{}", "application/json")
            seconds = float(json.loads(body)["seconds"])
            threading.Thread(target=owner.refuse, args=(seconds,), daemon=True).start()
        else:
            self._send(404, b"{}", "application/json")

    def _error(self, refused: Refused) -> None:
        content = {"code": refused.code, "message": refused.message, "details": []}
        assert not openapi.problems(content, "GoogleRpcStatus")
        self._send(refused.status, json.dumps(content).encode(), "application/json")

    def _send_page(self, page: Page) -> None:
        headers = {"Location": page.location, "Set-Cookie": page.cookie}
        self._send(page.status, page.text.encode(), "text/html; charset=utf-8", headers)

    def _send(self, status: int, content: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def _counted_down(counts: dict[str, int], name: str) -> bool:
    """Whether one is left of ``name``; it is then used up."""
    if counts.get(name, 0) <= 0:
        return False
    counts[name] -= 1
    return True


def _uploaded(kind: str, body: bytes) -> bytes | None:
    """The file ``uploadfile`` of a multipart form."""
    form = BytesParser(policy=HTTP).parsebytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + body)
    if not form.is_multipart():
        return None
    for part in form.iter_parts():
        if part.get_param("name", header="content-disposition") == "uploadfile":
            content = part.get_payload(decode=True)
            return content if isinstance(content, bytes) else None
    return None
