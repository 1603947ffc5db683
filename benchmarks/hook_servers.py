"""An MLflow server, a cluster that speaks the KFP v2 API, and an unreliable way between registry and hook."""

from __future__ import annotations

import http.client
import json
import os
import random
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography.fernet import Fernet

from benchmarks.hook_process import SECRET, free_port
from pipelines.triggers.app import PATH
from pipelines.triggers.signature import sign

ROOT = Path(__file__).resolve().parent.parent
START_S = 120.0


@contextmanager
def process(command: list[str], log: Path, variables: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process that is ended with the block."""
    with open(log, "ab") as stream:
        started = subprocess.Popen(
            command, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=stream, text=True
        )
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(timeout=20)
        except subprocess.TimeoutExpired:
            started.kill()


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """An MLflow server on SQLite that may call webhooks on this machine; its address."""
    port = free_port()
    variables = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        "MLFLOW_WEBHOOK_CACHE_TTL": "1",
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": Fernet.generate_key().decode(),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    with process(command, folder / "mlflow.log", variables) as server:
        threading.Thread(target=_drain, args=(server,), daemon=True).start()
        url = f"http://127.0.0.1:{port}"
        _wait(f"{url}/health", folder / "mlflow.log")
        yield url


def _drain(server: subprocess.Popen[str]) -> None:
    assert server.stdout is not None
    for _ in server.stdout:
        continue


def _wait(url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise TimeoutError(f"no answer from {url}; see {log}")


class KfpProcess:
    """The tests' KFP server, in a process of its own."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint

    def report(self) -> dict[str, Any]:
        """Every run that was created."""
        with urllib.request.urlopen(f"{self.endpoint}/admin/runs", timeout=30) as answer:
            content: dict[str, Any] = json.load(answer)
            return content

    def refuse(self, seconds: float) -> None:
        """Refuse connections for ``seconds``."""
        body = json.dumps({"seconds": seconds}).encode()
        call = urllib.request.Request(f"{self.endpoint}/admin/refuse", body, method="POST")
        with urllib.request.urlopen(call, timeout=30):
            return


@contextmanager
def kfp_server(folder: Path) -> Iterator[KfpProcess]:
    """A server that checks every request and answer against the published API."""
    command = [sys.executable, "-m", "tests.pipelines.kfp_server"]
    with process(command, folder / "kfp.log", {"PYTHONPATH": str(ROOT)}) as server:
        assert server.stdout is not None
        yield KfpProcess(server.stdout.readline().strip())


class Relay:
    """Between registry and hook: delivers late, out of order, twice, and once more under another id.

    Attributes:
        repeated: deliveries that were sent again as they were.
        signed_again: deliveries that were sent again under a new id, as a registry that fires twice would.
        delayed: deliveries that were held back.
    """

    def __init__(self, hook_port: int, *, seed: int) -> None:
        self.repeated = self.signed_again = self.delayed = 0
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._hook_port = hook_port
        relay = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
                status, retry_after = relay.deliver(dict(self.headers.items()), body)
                self.send_response(status)
                if retry_after:
                    self.send_header("Retry-After", retry_after)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Nothing: thousands of lines say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}{PATH}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def deliver(self, headers: dict[str, str], body: bytes) -> tuple[int, str]:
        """Forward one delivery; the hook's status and Retry-After, 502 where it is not there."""
        with self._lock:
            wait_s = self._random.uniform(0.2, 4.0) if self._random.random() < 0.2 else 0.0
            repeat, again = self._random.random() < 0.2, self._random.random() < 0.2
            self.delayed += wait_s > 0
            self.repeated += repeat
            self.signed_again += again
        time.sleep(wait_s)
        answer = self._forward(headers, body)
        if repeat:
            self._forward(headers, body)
        if again:
            now, other = int(time.time()), os.urandom(16).hex()
            fresh = {"X-MLflow-Delivery-Id": other, "X-MLflow-Timestamp": str(now)}
            self._forward({**headers, **fresh, "X-MLflow-Signature": sign(SECRET.encode(), other, now, body)}, body)
        return answer

    def _forward(self, headers: dict[str, str], body: bytes) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self._hook_port, timeout=20)
        try:
            connection.request("POST", PATH, body, {**headers, "Host": "hook", "Connection": "close"})
            answer = connection.getresponse()
            answer.read()
            return answer.status, answer.headers.get("Retry-After", "")
        except (OSError, http.client.HTTPException):
            return 502, ""
        finally:
            connection.close()

    def stop(self) -> None:
        """Take no more."""
        self._server.shutdown()
        self._server.server_close()
