"""A real OpenStack Swift with its S3 interface, on loopback, for tests and benchmarks.

Four processes (account, container, object, proxy) run from ``.venv-swift``, which
``tests/integration/setup_swift.sh`` makes. Everything they write lies under one folder.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

ENVIRONMENT = Path(__file__).resolve().parents[2] / ".venv-swift"
ACCESS_KEY = "test:tester"
SECRET_KEY = "testing"
REGION = "us-east-1"
BACKENDS = ("account", "container", "object")
SERVERS = (*BACKENDS, "proxy")

_RINGS = """
import sys
from swift.common.ring import RingBuilder
folder = sys.argv[1]
for name, port in zip(("account", "container", "object"), map(int, sys.argv[2:])):
    ring = RingBuilder(2, 1, 0)
    ring.add_dev({"id": 0, "region": 1, "zone": 1, "ip": "127.0.0.1", "port": port, "device": "disk", "weight": 1.0,
                  "replication_ip": "127.0.0.1", "replication_port": port})
    ring.rebalance()
    ring.get_ring().save(f"{folder}/{name}.ring.gz")
"""

_SWIFT = "[swift-hash]\nswift_hash_path_suffix = tests\n\n[storage-policy:0]\nname = one\ndefault = yes\n"

_BACKEND = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {folder}
devices = {folder}
mount_check = false
workers = 0
log_level = WARNING
fallocate_reserve = 0

[pipeline:main]
pipeline = {kind}-server

[app:{kind}-server]
use = egg:swift#{kind}
"""

_PROXY = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {folder}
workers = 0
log_level = WARNING

[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck proxy-logging listing_formats bulk s3api tempauth copy slo dlo \
versioned_writes symlink proxy-logging proxy-server

[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
# A backend that was killed and restarted by a test is asked again at once.
error_suppression_limit = 1000000

[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin

[filter:s3api]
use = egg:swift#s3api
location = us-east-1

[filter:versioned_writes]
use = egg:swift#versioned_writes
allow_object_versioning = true
"""

_PLAIN_FILTERS = "catch_errors gatekeeper healthcheck proxy-logging listing_formats bulk copy slo dlo symlink"


class SwiftMissing(RuntimeError):
    """``.venv-swift`` is not there."""


class SwiftServer:
    """One Swift cluster of one disk. ``start`` before use, ``stop`` always; or a ``with`` block.

    Args:
        folder: an empty folder on a file system with user extended attributes.
    """

    access_key = ACCESS_KEY
    secret_key = SECRET_KEY
    region = REGION

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._ports: dict[str, int] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def port(self) -> int:
        """Port of the S3 interface on 127.0.0.1."""
        return self._ports["proxy"]

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(process.pid for process in self._processes.values())

    def start(self, timeout_s: float = 60.0) -> None:
        """Write rings and configuration, start the four servers, wait until all answer.

        Raises:
            SwiftMissing: the environment was not set up.
            RuntimeError: a server ended or did not answer in ``timeout_s``.
        """
        if not (ENVIRONMENT / ".installed").is_file():
            raise SwiftMissing(
                f"expected OpenStack Swift in {ENVIRONMENT}, got no such environment. "
                "Run tests/integration/setup_swift.sh (`make test` does so first)."
            )
        (self.folder / "disk").mkdir(parents=True, exist_ok=True)
        self._ports = dict(zip(SERVERS, _free_ports(len(SERVERS)), strict=True))
        rings = [str(self._ports[kind]) for kind in BACKENDS]
        subprocess.run([ENVIRONMENT / "bin/python", "-c", _RINGS, self.folder, *rings], check=True, env=_environment())
        (self.folder / "swift.conf").write_text(_SWIFT)
        for kind in BACKENDS:
            (self.folder / f"{kind}.conf").write_text(
                _BACKEND.format(kind=kind, port=self._ports[kind], folder=self.folder)
            )
        plain = "".join(
            f"\n[filter:{name}]\nuse = egg:swift#{name.replace('-', '_')}\n" for name in _PLAIN_FILTERS.split()
        )
        (self.folder / "proxy.conf").write_text(_PROXY.format(port=self.port, folder=self.folder) + plain)
        try:
            for kind in SERVERS:
                self._spawn(kind)
            for kind in SERVERS:
                self._wait(kind, timeout_s)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every server that this object started."""
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()

    def kill(self, kind: str = "object") -> None:
        """End one server at once; without the object server, the S3 interface answers 503."""
        process = self._processes.pop(kind)
        process.kill()
        process.wait()

    def restart(self, kind: str = "object", timeout_s: float = 30.0) -> None:
        """Start a killed server again on its old port, and wait until it answers."""
        if kind not in self._processes:
            self._spawn(kind)
            self._wait(kind, timeout_s)

    def log(self, kind: str) -> str:
        """What one server has written so far."""
        return (self.folder / f"{kind}.log").read_text(errors="replace")

    def __enter__(self) -> SwiftServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _spawn(self, kind: str) -> None:
        command = [f"{ENVIRONMENT}/bin/swift-{kind}-server", f"{self.folder}/{kind}.conf", "--verbose"]
        with open(self.folder / f"{kind}.log", "ab") as log:
            self._processes[kind] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment()
            )

    def _wait(self, kind: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not _answers(self._ports[kind]):
            if self._processes[kind].poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Swift's {kind} server did not start. Its last words:\n{self.log(kind)[-2000:]}")
            time.sleep(0.05)


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "AWS_"))}
    return kept | {"PATH": f"{ENVIRONMENT / 'bin'}:{os.environ.get('PATH', '')}"}


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthcheck", timeout=2):
            return True
    except urllib.error.HTTPError:
        return True  # a storage server answers 400 to this path: it is up
    except OSError:
        return False


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
