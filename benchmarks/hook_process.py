"""A hook in a process of its own, for the benchmarks: started, asked, killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SECRET = "benchmark-secret-of-the-webhook-0123456789"
START_S = 60.0


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class HookProcess:
    """``quarantine hooks serve`` on 127.0.0.1.

    Attributes:
        folder: holds the queue and the log.
        options: further options of the command.
        environment: further variables.
        queue_file: the SQLite file; by default in ``folder``.
    """

    folder: Path
    port: int
    options: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    queue_file: Path | None = None
    process: subprocess.Popen[bytes] | None = None

    @property
    def queue_url(self) -> str:
        """Address of the queue."""
        return f"sqlite:///{self.queue_file or self.folder / 'queue.db'}"

    @property
    def url(self) -> str:
        """Address of the server."""
        return f"http://127.0.0.1:{self.port}"

    def start(self, *, wait: bool = True) -> None:
        """Start it, and wait until it keeps deliveries."""
        command = [sys.executable, "-m", "pipelines.cli", "hooks", "serve", "--queue", self.queue_url]
        variables = {**os.environ, "QUARANTINE_HOOK_SECRET": SECRET, "OMP_NUM_THREADS": "1", **self.environment}
        with open(self.folder / "hook.log", "ab") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port), *self.options], env=variables, stdout=log, stderr=log
            )
        if wait:
            self.wait_ready()

    def wait_ready(self, timeout_s: float = START_S) -> None:
        """Wait until /readyz says so. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while not self.ready():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the hook is not ready after {timeout_s:.0f} s; see {self.folder / 'hook.log'}")
            time.sleep(0.05)

    def ready(self) -> bool:
        """Whether /readyz answers 200 now."""
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def running(self) -> bool:
        """Whether the process is there."""
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """``kill -9``."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        if self.process is None:
            return 0
        self.process.terminate()
        return self.process.wait(timeout=60)

    def cpu_s(self) -> float:
        """CPU time so far, seconds."""
        if self.process is None:
            return 0.0
        spent = psutil.Process(self.process.pid).cpu_times()
        return float(spent.user + spent.system)

    def rss_mb(self) -> float:
        """Resident memory now, MB."""
        if self.process is None:
            return 0.0
        return float(psutil.Process(self.process.pid).memory_info().rss) / 1e6
