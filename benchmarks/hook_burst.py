"""From a registered version to a submitted run, with a real MLflow server: once in quiet, once among failures.

Row ``quiet``: 500 versions are registered as fast as the server takes them; the time from registration to submission
is that from MLflow's own creation time to the moment the queue holds the id of the run.

Row ``failures``: the same, and meanwhile the hook is killed with ``kill -9`` twenty times, the file system of its queue
is full once, the KFP endpoint refuses connections for a minute, and deliveries come late, out of order and more than
once. After that one sweep runs. Lost is a version without a run; doubled is every run beyond the first of a version.

    python -m benchmarks.hook_burst [--versions 500] [--scenario quiet|failures|both]

Needs root, for a small file system of its own for the queue (``mount -t tmpfs``).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import select

from benchmarks.hook_process import SECRET, HookProcess, free_port
from benchmarks.hook_servers import KfpProcess, Relay, kfp_server, mlflow_server
from benchmarks.results import write_results
from components._runtime.mlflow_connection import MlflowSettings, connect
from pipelines.compile import compile_to
from pipelines.triggers.app import PATH
from pipelines.triggers.queue import Queue
from pipelines.triggers.tables import work

MODELS = 25
REGISTRARS = 2
WARM_UP = "vision-1000"
KILLS = 20
KILL_EVERY_S = (1.0, 8.0)
DISK_FULL_S = 15.0
DISK_MB = 8
KFP_DOWN_S = 60.0
SETTLED_S = 45.0
"""MLflow gives up a delivery about this long after the last failure."""
WATCH = {
    "evidence": "s3://quarantine/evidence",
    "rules": [
        {
            "models": ["vision-*"],
            "register": "quarantined",
            "plan": {"clean": "s3://data/clean.parquet", "policy": "standard"},
        }
    ],
}


class Burst:
    """One scenario's servers and what was registered."""

    def __init__(self, folder: Path, tracking_uri: str, kfp: KfpProcess, hook: HookProcess, watch: Path) -> None:
        self.folder = folder
        self.tracking_uri = tracking_uri
        self.kfp = kfp
        self.hook = hook
        self.watch = watch
        self.registered: dict[tuple[str, str], float] = {}

    def register(self, versions: int) -> None:
        """Register ``versions`` versions, as fast as the server takes them."""
        client = connect(MlflowSettings(self.tracking_uri)).client
        for number in range(MODELS):
            client.create_registered_model(f"vision-{number}")

        def one(number: int) -> None:
            source = f"s3://models/{number}/model.safetensors"
            made = client.create_model_version(f"vision-{number % MODELS}", source)
            self.registered[made.name, str(made.version)] = made.creation_timestamp / 1e3

        with ThreadPoolExecutor(REGISTRARS) as pool:
            list(pool.map(one, range(versions)))

    def wait_settled(self, timeout_s: float, *, quiet_s: float) -> bool:
        """Wait until nothing was in the queue for ``quiet_s``; whether that came in time."""
        queue, deadline, since = Queue.open(self.hook.queue_url), time.monotonic() + timeout_s, time.monotonic()
        try:
            while time.monotonic() < deadline and time.monotonic() - since < quiet_s:
                counts = queue.counts()
                if counts["hints"] + counts["pending"] + counts["claimed"]:
                    since = time.monotonic()
                time.sleep(0.2)
            return time.monotonic() - since >= quiet_s
        finally:
            queue.close()

    def sweep(self) -> None:
        """``quarantine sweep``, once. Exit code 1 says that it found something."""
        command = [sys.executable, "-m", "pipelines.cli", "sweep", "--tracking-uri", self.tracking_uri, "--json"]
        command += ["--watch", str(self.watch), "--queue", self.hook.queue_url]
        with open(self.folder / "sweep.log", "ab") as log:
            code = subprocess.run(command, stdout=log, stderr=log, check=False, timeout=600).returncode
        if code not in (0, 1):
            raise RuntimeError(f"the sweep ended with {code}; see {self.folder / 'sweep.log'}")

    def delays_s(self) -> list[float]:
        """From MLflow's creation time to the record of the run, in order."""
        queue = Queue.open(self.hook.queue_url)
        with queue.engine.begin() as connection:
            rows = connection.execute(select(work.c.model, work.c.version, work.c.changed_at, work.c.state)).all()
        queue.close()
        submitted = {(row.model, row.version): row.changed_at for row in rows if row.state == "submitted"}
        return sorted(submitted[each] - at for each, at in self.registered.items() if each in submitted)

    def row(self, scenario: str) -> dict[str, Any]:
        """The figures, from what the cluster says was created."""
        report = self.kfp.report()
        if report["violations"]:
            raise RuntimeError(f"requests that the API does not know: {report['violations'][:3]}")
        runs = Counter(_version_of(run["display_name"]) for run in report["runs"])
        delays_s = self.delays_s()
        return {
            "scenario": scenario,
            "versions": len(self.registered),
            "submitted": sum(each in runs for each in self.registered),
            "lost": sum(each not in runs for each in self.registered),
            "doubled": sum(runs.values()) - len(runs),
            "strangers": sum(each not in self.registered for each in runs if each[0] != WARM_UP),
            "kills": 0,
            "median_s": round(delays_s[len(delays_s) // 2], 3),
            "p99_s": round(delays_s[int(0.99 * (len(delays_s) - 1))], 3),
            "registering_s": round(max(self.registered.values()) - min(self.registered.values()), 1),
        }


def _version_of(run_name: str) -> tuple[str, str]:
    found = re.fullmatch(r"(vision-\d+)-(\d+)-[0-9a-f]{32}", run_name)
    if found is None:
        raise RuntimeError(f"a run of another name: {run_name}")
    return found[1], found[2]


@contextmanager
def servers(folder: Path, queue_folder: Path, *, seed: int | None) -> Iterator[tuple[Burst, Relay | None]]:
    """MLflow, KFP and the hook; with ``seed`` the unreliable way between them."""
    package = compile_to(folder).written[0]
    watch = folder / "watch.yaml"
    watch.write_text(json.dumps(WATCH))
    with ExitStack() as stack:
        tracking_uri = stack.enter_context(mlflow_server(folder))
        kfp = stack.enter_context(kfp_server(folder))
        options = ["--with-worker", "--watch", str(watch), "--endpoint", kfp.endpoint, "--package", str(package)]
        options += ["--lease-s", "5", "--max-delay-s", "5", "--retry-after-s", "5", "--poll-s", "0.05"]
        environment = {"MLFLOW_TRACKING_URI": tracking_uri}
        hook = HookProcess(folder, free_port(), options, environment, queue_folder / "queue.db")
        hook.start()
        stack.callback(hook.stop)
        relay = None
        if seed is not None:
            relay = Relay(hook.port, seed=seed)
            stack.callback(relay.stop)
        client = connect(MlflowSettings(tracking_uri)).client
        client.create_webhook(
            name="quarantine",
            url=relay.url if relay else hook.url + PATH,
            events=["model_version.created"],
            secret=SECRET,
        )
        yield Burst(folder, tracking_uri, kfp, hook, watch), relay


def quiet(folder: Path, versions: int) -> dict[str, Any]:
    """Nothing fails."""
    with servers(folder, folder, seed=None) as (burst, _):
        _warm_up(burst)
        burst.register(versions)
        burst.wait_settled(300, quiet_s=5)
        return burst.row("quiet")


def _warm_up(burst: Burst) -> None:
    """One version, so that no figure holds the time of imports and of the pipeline's upload."""
    client = connect(MlflowSettings(burst.tracking_uri)).client
    client.create_registered_model(WARM_UP)
    client.create_model_version(WARM_UP, "s3://models/warm")
    deadline = time.monotonic() + 120
    while not burst.kfp.report()["created"]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no run after 120 s; see {burst.hook.folder / 'hook.log'}")
        time.sleep(0.1)


def failures(folder: Path, versions: int, seed: int) -> dict[str, Any]:
    """Everything fails that may, then one sweep."""
    with small_disk(folder / "queue") as disk, servers(folder, disk, seed=seed) as (burst, relay):
        stop = threading.Event()
        chaos = threading.Thread(target=_kill, args=(burst.hook, random.Random(seed), stop))
        others = [threading.Thread(target=_fill, args=(disk,)), threading.Thread(target=_cut, args=(burst.kfp,))]
        for thread in (chaos, *others):
            thread.start()
        burst.register(versions)
        for thread in (chaos, *others):
            thread.join()
        burst.hook.wait_ready()
        burst.wait_settled(600, quiet_s=SETTLED_S)
        before = burst.row("failures")
        burst.sweep()
        burst.wait_settled(300, quiet_s=5)
        assert relay is not None
        return {
            **burst.row("failures"),
            "kills": KILLS,
            "found_by_sweep": before["lost"],
            "repeated": relay.repeated,
            "signed_again": relay.signed_again,
            "delayed": relay.delayed,
            "not_kept": (folder / "hook.log").read_text().count('"result": "not_kept"'),
        }


def _kill(hook: HookProcess, chance: random.Random, stop: threading.Event) -> None:
    for _ in range(KILLS):
        stop.wait(chance.uniform(*KILL_EVERY_S))
        hook.kill()
        while True:
            hook.start(wait=False)
            # On a full disk it cannot open its queue and ends; a supervisor starts it again.
            while hook.running() and not hook.ready():
                time.sleep(0.1)
            if hook.running():
                break
            time.sleep(0.5)


def _fill(disk: Path) -> None:
    time.sleep(10)
    ballast = disk / "ballast"
    try:
        with open(ballast, "wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 4096)
    except OSError:
        time.sleep(DISK_FULL_S)
    ballast.unlink()


def _cut(kfp: KfpProcess) -> None:
    time.sleep(20)
    kfp.refuse(KFP_DOWN_S)
    time.sleep(KFP_DOWN_S)


@contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    """A file system of a few megabytes at ``path``."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def main() -> None:
    """Measure, and write ``hook-burst.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenario", choices=["quiet", "failures", "both"], default="both")
    parser.add_argument("--keep", type=Path, help="keep the logs in this folder")
    options = parser.parse_args()
    started, rows = datetime.now(UTC), []
    with tempfile.TemporaryDirectory(prefix="quarantine-hook-burst-") as temporary:
        root = options.keep or Path(temporary)
        for scenario in ("quiet", "failures"):
            if options.scenario in (scenario, "both"):
                folder = root / scenario
                folder.mkdir(parents=True)
                rows.append(
                    quiet(folder, options.versions)
                    if scenario == "quiet"
                    else failures(folder, options.versions, options.seed)
                )
                print(json.dumps(rows[-1], indent=2), flush=True)
    if options.scenario == "both":
        command = f"python -m benchmarks.hook_burst --versions {options.versions}"
        write_results("hook-burst", rows, command=command, started=started)


if __name__ == "__main__":
    main()
