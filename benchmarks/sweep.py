"""A sweep over a large registry: ``sweep.json``.

``python -m benchmarks.sweep`` starts an MLflow server on SQLite whose registry holds 10,000 versions: 8,000 in 400
incoming models, and 2,000 in 100 models that runs write to, decided, one of each promoted. One version is really
decided and promoted through the server; the others are written into MLflow's tables at once, because 10,000
registrations take longer than all sweeps together, and those that are promoted share its files. So the sweep reads
evidence and makes a decision again 100 times. Each row is one ``quarantine sweep`` in a process of its own, from the
start of the interpreter to its end, with a queue on SQLite:

- ``first``: no memory, all 6,000 undecided versions are enqueued;
- ``next``: 50 versions are new, the memory knows the rest;
- ``memory lost``: the same without the memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.results import write_results
from components._runtime.mlflow_connection import MlflowSettings, connect
from tests.integration.mlflow_stores import MlflowServer, _wait_until_healthy, free_port
from tests.pipelines.sweep.registry import decided, policy_mapping

INCOMING, OUTPUTS, EACH = 400, 100, 20
NEW = 50
COMMAND = "python -m benchmarks.sweep"


@contextmanager
def mlflow_server(root: Path) -> Iterator[MlflowServer]:
    """A server with one worker on ``root/mlflow.db``."""
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{root / 'mlflow.db'}", "--artifacts-destination", str(root / "artifacts")),
    ]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (root / "server.log").open("wb") as log:
        server = subprocess.Popen(
            command, cwd=root, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait_until_healthy(uri, server, root / "server.log")
        yield MlflowServer(uri, server.pid, root / "artifacts")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)


def fill(database: Path) -> None:
    """The versions beside the one that is there, ``output-0/1``, straight into MLflow's tables."""
    now_ms = int(time.time() * 1000) - 60_000
    with closing(sqlite3.connect(database, timeout=30)) as registry:
        source, run_id = registry.execute("SELECT source, run_id FROM model_versions").fetchone()
        tags = dict(registry.execute("SELECT key, value FROM model_version_tags"))
        incoming = [f"incoming-{number}" for number in range(INCOMING)]
        outputs = [f"output-{number}" for number in range(OUTPUTS)]
        models = [(name, now_ms, now_ms) for name in (*incoming, *outputs[1:])]
        registry.executemany(
            "INSERT INTO registered_models (name, creation_time, last_updated_time) VALUES (?, ?, ?)", models
        )
        raw = [(name, number, f"s3://incoming/{name}/{number}", None) for name in incoming for number in _numbers()]
        made = [(name, number, source, run_id) for name in outputs for number in _numbers()]
        made.remove(("output-0", 1, source, run_id))
        _insert_versions(registry, [*raw, *made], now_ms)
        origins = iter([f"models:/{name}/{number}" for name, number, *_ in raw][1 :: len(raw) // len(made)])
        rows = [
            (name, number, key, next(origins) if key == "quarantine.origin" else value)
            for name, number, *_ in made
            for key, value in tags.items()
        ]
        registry.executemany("INSERT INTO model_version_tags (name, version, key, value) VALUES (?, ?, ?, ?)", rows)
        registry.executemany(
            "INSERT INTO registered_model_aliases (name, alias, version) VALUES (?, 'champion', ?)",
            [(name, EACH) for name in outputs[1:]],
        )
        registry.commit()


def add_versions(database: Path) -> None:
    """``NEW`` further versions, one each of so many models, and the models' time of change."""
    now_ms = int(time.time() * 1000)
    names = [f"incoming-{number}" for number in range(NEW)]
    with closing(sqlite3.connect(database, timeout=30)) as registry:
        _insert_versions(registry, [(name, EACH + 1, f"s3://incoming/{name}/new", None) for name in names], now_ms)
        registry.executemany(
            "UPDATE registered_models SET last_updated_time = ? WHERE name = ?", [(now_ms, name) for name in names]
        )
        registry.commit()


def _numbers() -> range:
    return range(1, EACH + 1)


def _insert_versions(registry: sqlite3.Connection, rows: list[tuple[Any, ...]], now_ms: int) -> None:
    registry.executemany(
        "INSERT INTO model_versions (name, version, source, run_id, creation_time, last_updated_time, current_stage,"
        " status, storage_location) VALUES (?, ?, ?, ?, ?, ?, 'None', 'READY', ?)",
        [(*row, now_ms, now_ms, row[2]) for row in rows],
    )


def measure(what: str, server: MlflowServer, root: Path, policy: Path) -> dict[str, Any]:
    """One sweep, as a row."""
    server_cpu_s = _cpu_of_group(server)
    command = [
        *(sys.executable, "-m", "pipelines.cli", "sweep", "--json", "--tracking-uri", server.uri),
        *("--policy", str(policy), "--alias", "champion", "--memory", str(root / "memory.db")),
        *("--queue", f"sqlite:///{root / 'queue.db'}"),
    ]
    with (root / "report.json").open("wb") as out, (root / "sweep.log").open("wb") as log:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=log)
        peak_kb = cpu_s = 0.0
        while process.poll() is None:
            peak_kb, cpu_s = max(peak_kb, _peak_kb(process.pid)), max(cpu_s, _cpu_s(process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - begin
    if process.returncode not in (0, 1):
        raise RuntimeError(f"sweep ended with {process.returncode}:\n{(root / 'sweep.log').read_text()[-2000:]}")
    report = json.loads((root / "report.json").read_bytes())
    row = {
        "sweep": what,
        "versions": report["versions"],
        "seconds": round(seconds, 1),
        "peak_mb": round(peak_kb * 1024 / 1e6),
        "cpu_seconds": round(cpu_s, 1),
        "server_cpu_seconds": round(_cpu_of_group(server) - server_cpu_s, 1),
        "models_listed": report["listed"],
        "undecided": report["found"]["undecided"],
        "drift": report["found"]["drift"],
        "enqueued": report["queued"]["enqueued"],
    }
    print(json.dumps(row), flush=True)
    return row


def _peak_kb(pid: int) -> float:
    """The process's own highest resident size; what ``wait4`` says includes that of its parent before the exec."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text("ascii"), re.MULTILINE)
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return float(found[1]) if found else 0.0


def _cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _cpu_of_group(server: MlflowServer) -> float:
    """CPU time of all of the server's processes, seconds."""
    groups = [path for path in Path("/proc").iterdir() if path.name.isdigit()]
    return sum(_cpu_s(int(path.name)) for path in groups if _group(int(path.name)) == server.group)


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return -1


def main() -> int:
    """Exit code 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    started = datetime.now(UTC)
    with tempfile.TemporaryDirectory(prefix="quarantine-bench-sweep-") as scratch:
        root = Path(scratch)
        policy = root / "policy.yaml"
        policy.write_text(json.dumps(policy_mapping()))
        connect(MlflowSettings(f"sqlite:///{root / 'mlflow.db'}")).client.search_experiments(max_results=1)
        with mlflow_server(root) as server:
            at = started.isoformat(timespec="seconds")
            decided(connect(MlflowSettings(server.uri)), root, "output-0", origin="models:/incoming-0/1", at=at)
            fill(root / "mlflow.db")
            print("the registry is filled", file=sys.stderr)
            rows = [measure("first", server, root, policy)]
            add_versions(root / "mlflow.db")
            rows.append(measure("next", server, root, policy))
            (root / "memory.db").unlink()
            rows.append(measure("memory lost", server, root, policy))
    print(write_results("sweep", rows, command=COMMAND, started=started))
    return 0


if __name__ == "__main__":
    sys.exit(main())
