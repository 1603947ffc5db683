"""The real process: signals, full disk, memory, secrets, worker beside the server."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from defense_core.errors import ConfigError
from pipelines.triggers.app import PATH
from pipelines.triggers.queue import Queue
from tests.triggers.fakes import SECRET, WATCH, event, headers

CANARIES = {
    "QUARANTINE_HOOK_SECRET": SECRET,
    "QUARANTINE_HOOK_SECRET_PREVIOUS": "canary-previous-0123456789",
    "MLFLOW_TRACKING_PASSWORD": "canary-mlflow-password",
    "KFP_TOKEN": "canary-kfp-token",
}


class Server:
    """``quarantine hooks serve`` on a free port."""

    def __init__(self, folder, *options, environment=None):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.folder = folder
        self.queue_url = f"sqlite:///{folder}/queue.db"
        self.command = [sys.executable, "-m", "pipelines.cli", "hooks", "serve", "--queue", self.queue_url]
        self.command += ["--port", str(self.port), *options]
        self.environment = {**os.environ, **CANARIES, "OMP_NUM_THREADS": "1", **(environment or {})}
        self.start()

    def start(self):
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(self.command, env=self.environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while self.get("/readyz") != 200:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)

    def get(self, path):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def post(self, body, delivery, **options):
        call = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{PATH}", body, headers(body, delivery, **options), method="POST"
        )
        try:
            with urllib.request.urlopen(call, timeout=20) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    @property
    def log(self):
        return (self.folder / "log").read_text()

    def counts(self):
        queue = Queue.open(self.queue_url)
        try:
            return queue.counts()
        finally:
            queue.close()


@pytest.fixture
def served(tmp_path):
    started = []

    def start(*options, **more):
        started.append(Server(tmp_path, *options, **more))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()


def test_server_keeps_answers_stops_and_remembers(served):
    server = served()
    assert [server.post(event(), "d1"), server.post(event(), "d1"), server.post(event(), "d2", secret="x" * 20)] == [
        202,
        409,
        401,
    ]
    assert server.post(event(), "d3", secret=CANARIES["QUARANTINE_HOOK_SECRET_PREVIOUS"]) == 202
    assert [server.get(path) for path in ("/healthz", "/metrics", PATH)] == [200, 200, 405]
    server.process.kill()
    server.process.wait()
    server.start()
    assert server.post(event(), "d1") == 409
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0
    assert "hook stopped" in server.log
    assert server.counts()["hints"] == 1
    assert "canary" not in server.log
    assert SECRET not in server.log
    assert all(json.loads(line)["event"] for line in server.log.splitlines())


def test_full_disk_is_503_and_afterwards_everything_is_taken(served):
    server = served()
    assert server.post(event(version="1"), "d1") == 202
    queue_bytes = sum(path.stat().st_size for path in server.folder.glob("queue.db*"))
    # No file of the process may grow beyond this, as on a full disk. The log has its own, smaller, size.
    before = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (queue_bytes, resource.RLIM_INFINITY))
    answers = [server.post(event("m" * 200, str(number + 2)), f"e{number}") for number in range(120)]
    assert 503 in answers
    assert set(answers) <= {202, 503}
    assert server.get("/healthz") == 200
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, before)
    repeated = [server.post(event("m" * 200, str(number + 2)), f"e{number}") for number in range(120)]
    assert [{202: 409, 503: 202}[first] for first in answers] == repeated
    assert server.counts()["hints"] == 121


def test_rotation_without_a_restart(served, tmp_path):
    file = tmp_path / "secret"
    file.write_text("first-secret-0123456789")
    server = served(
        "--secret-file", str(file), environment={"QUARANTINE_HOOK_SECRET": "", "QUARANTINE_HOOK_SECRET_PREVIOUS": ""}
    )
    assert server.post(event(), "d1", secret="first-secret-0123456789") == 202
    file.write_text("second-secret-01234567890")
    deadline = time.monotonic() + 10
    while server.post(event(), "d2", secret="second-secret-01234567890") == 401 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert server.post(event(), "d2", secret="second-secret-01234567890") == 409
    assert server.post(event(), "d3", secret="first-secret-0123456789") == 401


def test_worker_beside_the_server_asks_the_registry_and_stops_with_it(served, tmp_path):
    (tmp_path / "watch.yaml").write_text(json.dumps(WATCH))
    environment = {
        "MLFLOW_TRACKING_URI": "http://user:canary-in-a-url@127.0.0.1:9",
        "KFP_ENDPOINT": "http://127.0.0.1:9",
        "QUARANTINE_WATCH": str(tmp_path / "watch.yaml"),
    }
    server = served("--with-worker", environment=environment)
    assert server.post(event(), "d1") == 202
    deadline = time.monotonic() + 60
    while '"result": "unavailable"' not in server.log and time.monotonic() < deadline:
        time.sleep(0.2)
    assert '"result": "unavailable"' in server.log
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    assert "worker stopped" in server.log
    assert "canary" not in server.log
    assert server.counts()["hints"] == 1


@pytest.mark.parametrize(
    ("options", "environment", "what"),
    [
        ([], {"QUARANTINE_HOOK_SECRET": ""}, "no secret"),
        ([], {"QUARANTINE_HOOK_SECRET": "short"}, "too short"),
        (["--tls-key", "k.pem"], {}, "TLS needs both"),
        (["--tls-key", "k.pem", "--tls-certificate", "missing.pem"], {}, "cannot be used"),
        (["--queue", "mysql://u:canary@h/d"], {}, "not usable"),
        (["--with-worker"], {}, "no watch file"),
    ],
)
def test_unusable_settings_are_refused_at_the_start(tmp_path, options, environment, what):
    from typer.testing import CliRunner

    from pipelines.hooks_cli import app

    variables = dict.fromkeys((*CANARIES, "QUARANTINE_WATCH", "KFP_ENDPOINT"))
    found = CliRunner().invoke(
        app, ["serve", *options], env={**variables, "QUARANTINE_HOOK_SECRET": SECRET, **environment}
    )
    assert type(found.exception).__name__ == "ConfigError"
    assert what in str(found.exception)
    assert "canary" not in str(found.exception)


def test_a_port_that_is_taken_is_a_typed_error_of_the_worker(tmp_path):
    from pipelines.triggers.serve import run_worker

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="metrics cannot be served"):
        run_worker(f"sqlite:///{tmp_path}/q.db", None, log=None, metrics_port=taken.getsockname()[1])


@pytest.mark.parametrize("field", ["clean", "test", "pool"])
def test_a_file_of_this_machine_in_the_watch_file_is_refused_at_the_start(tmp_path, field):
    from typer.testing import CliRunner

    from pipelines.hooks_cli import app

    rules = [WATCH["rules"][0], {**WATCH["rules"][1], "plan": {**WATCH["rules"][1]["plan"], field: "here.npz"}}]
    (tmp_path / "watch.yaml").write_text(json.dumps({**WATCH, "rules": rules}))
    words = [
        "work",
        "--watch",
        str(tmp_path / "watch.yaml"),
        "--queue",
        "sqlite://",
        "--endpoint",
        "http://127.0.0.1:9",
    ]
    found = CliRunner().invoke(app, words)
    assert f"watch.rules[1]: {field} is not reachable from a cluster" in str(found.exception)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "pools.yaml"),
        ("format: 1\nnamespace: another-team\n", "node pools are those of another namespace"),
        ("format: 1\nsteps: {purify: {timeout_s: 1}}\n", "steps.purify is no step"),
    ],
)
def test_node_pools_that_cannot_be_used_are_refused_at_the_start(tmp_path, content, what):
    from typer.testing import CliRunner

    from pipelines.hooks_cli import app

    (tmp_path / "watch.yaml").write_text(json.dumps(WATCH))
    if content is not None:
        (tmp_path / "pools.yaml").write_text(content)
    files = ["--watch", str(tmp_path / "watch.yaml"), "--node-pools", str(tmp_path / "pools.yaml")]
    where = ["--endpoint", "http://127.0.0.1:9", "--namespace", "quarantine"]
    found = CliRunner().invoke(app, ["work", *files, *where, "--queue", "sqlite://"])
    assert isinstance(found.exception, ConfigError)
    assert what in str(found.exception)


def test_hook_and_worker_need_nothing_that_only_steps_import():
    program = """
import sys
for name in ("torch", "torchvision", "scipy", "pyarrow", "PIL", "onnx", "onnxruntime", "matplotlib", "safetensors"):
    sys.modules[name] = None
import pipelines.cli, pipelines.console, pipelines.triggers.serve, pipelines.triggers.kfp_submitter
import pipelines.triggers.watch, pipelines.triggers.registry, pipelines.cluster_options
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
