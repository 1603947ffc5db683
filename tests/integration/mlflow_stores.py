"""MLflow for tests: SQLite stores copied from one template, and one real server a session.

``tests/conftest.py`` imports the fixtures. A store's migrations take seconds, a copy none.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from components._runtime.mlflow_connection import MlflowConnection, MlflowSettings, connect

STARTUP_TIMEOUT_S = 90


@dataclass(frozen=True)
class MlflowServer:
    """A running server.

    Attributes:
        uri: its address on the loopback interface.
        group: its process group.
        artifacts: where it keeps the artifacts that clients send through it.
    """

    uri: str
    group: int
    artifacts: Path

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop answering for a while, as a server does whose node is gone."""
        self.freeze()
        try:
            yield
        finally:
            self.thaw()

    def freeze(self) -> None:
        os.killpg(self.group, signal.SIGSTOP)

    def thaw(self) -> None:
        os.killpg(self.group, signal.SIGCONT)


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty SQLite store with all tables."""
    path = tmp_path_factory.mktemp("mlflow-template") / "mlflow.db"
    connection = connect(MlflowSettings(tracking_uri=f"sqlite:///{path}"))
    connection.client.search_experiments(max_results=1)
    return path


def copied_store(template: Path, folder: Path, **settings: Any) -> MlflowConnection:
    """A store without a server: a copy of ``template`` in ``folder``."""
    folder.mkdir(exist_ok=True)
    path = folder / "mlflow.db"
    shutil.copyfile(template, path)
    return connect(MlflowSettings(tracking_uri=f"sqlite:///{path}", **settings))


@pytest.fixture
def mlflow_sqlite(mlflow_template: Path, tmp_path: Path) -> MlflowConnection:
    """A store of the test's own, without a server."""
    return copied_store(mlflow_template, tmp_path / "mlflow", experiment="tests")


@pytest.fixture(scope="session")
def mlflow_server(mlflow_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A real server on SQLite that takes artifacts through its own API."""
    root = tmp_path_factory.mktemp("mlflow-server")
    shutil.copyfile(mlflow_template, root / "mlflow.db")
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{root / 'mlflow.db'}", "--artifacts-destination", str(root / "artifacts")),
    ]
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")},
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    with open(root / "server.log", "wb") as log:
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait_until_healthy(uri, process, root / "server.log")
        yield MlflowServer(uri, process.pid, root / "artifacts")
    finally:
        os.killpg(process.pid, signal.SIGCONT)
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def alias_of(connection: MlflowConnection, name: str, alias: str = "champion") -> str | None:
    """The version that ``alias`` of the registered model stands at."""
    version = connection.client.get_registered_model(name).aliases.get(alias)
    return None if version is None else str(version)


def free_port() -> int:
    """A port of the loopback interface on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(uri: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + STARTUP_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the MLflow server ended at once:\n{log.read_text()[-4000:]}")
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)
    raise RuntimeError(f"the MLflow server did not answer in {STARTUP_TIMEOUT_S} s:\n{log.read_text()[-4000:]}")
