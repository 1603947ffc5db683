"""A purify step that is killed at a random point and started again: ``preemption.json``.

``python -m benchmarks.preemption``. The component itself runs in a process of its own on the demo's digits
model. First undisturbed and without checkpoints, for its digest and its time; then it gets SIGKILL after a
uniformly random fraction of that time and is started again, as an orchestrator does with a pod that was preempted.
The time is CPU time, which other work on the machine does not stretch, from where the purification begins.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

from benchmarks.results import write_results

CONFIGS: dict[str, dict[str, Any]] = {
    "tsbd": {"lr_grid": [0.01, 0.02]},
    "fip": {"lr": 0.02, "trace_every": 4, "retain_images": 100},
    "nft": {"sparsity": 5e-4},
    "ngf": {},
}
"""Shorter searches than by default, so that a purification takes a few seconds."""
METHODS = tuple(CONFIGS)
KILLS = 20
INTERVAL_S = 0.2
"""Between checkpoints; the default is made for purifications of minutes and hours."""
BEGINS = re.compile(r"purify\.\w+ begins")
RESUMED = re.compile(r" (?:goes on|had ended) at step (\d+)")


@dataclass(frozen=True)
class Attempt:
    """One start of the step.

    Attributes:
        killed: whether it was, rather than ending by itself.
        cpu_seconds: from where the purification began to the end.
        resumed_at_step: steps, over all loops, that came from checkpoints.
    """

    killed: bool
    cpu_seconds: float
    resumed_at_step: int


def purify_there(arguments: dict[str, Any], interval_s: float, log: str) -> None:
    """The step's process: the component, with its log in a file."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    os.environ["QUARANTINE_CHECKPOINT_S"] = str(interval_s)
    from components.purify_model.component import purify_model

    artifacts = ("bundle", "data", "purified", "evidence")
    given = {name: SimpleNamespace(path=arguments[name], metadata={}) for name in artifacts}
    purify_model.python_func(**{**arguments, **given})


def attempt(arguments: Mapping[str, Any], *, interval_s: float, kill_after_s: float | None = None) -> Attempt:
    """Start the step; end it so many seconds of CPU time after its purification began."""
    # A server that has imported torch forks the step's process, so that imports are not paid for each time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["components.purify_model.step", "components.purify_model.component"])
    with tempfile.TemporaryDirectory(prefix="quarantine-preemption-log-") as folder:
        log = Path(folder) / "log"
        log.touch()
        process = context.Process(target=purify_there, args=(dict(arguments), interval_s, str(log)))
        process.start()
        seconds = _watched(process, log, kill_after_s)
        process.join()
        lines = log.read_text("utf-8")
    if process.exitcode not in (0, -signal.SIGKILL):
        raise SystemExit(f"the step ended with {process.exitcode}: {lines[-1000:]}")
    return Attempt(process.exitcode != 0, seconds, sum(int(found[1]) for found in RESUMED.finditer(lines)))


def _watched(process: Any, log: Path, kill_after_s: float | None) -> float:
    """CPU seconds from the beginning of the purification to the end of the process, or to its kill."""
    began: float | None = None
    seconds = 0.0
    try:
        watched = psutil.Process(process.pid)
        while process.is_alive():
            times = watched.cpu_times()
            if began is None:
                began = times.user + times.system if BEGINS.search(log.read_text("utf-8")) else None
            else:
                seconds = times.user + times.system - began
            if kill_after_s is not None and began is not None and seconds >= kill_after_s:
                process.kill()
                break
            time.sleep(0.01)
    except psutil.NoSuchProcess:  # it ended between two looks
        return seconds
    return seconds


def make_files(work: Path) -> dict[str, str]:
    """The demo's model as a bundle, and its clean images, as the fetch step leaves them."""
    from dataclasses import replace

    from components.fetch_model.step import fetch_model
    from pipelines.demo import make_inputs, make_plan, write_inputs

    model, clean, test = write_inputs(make_inputs(0), work / "inputs")
    plan = replace(make_plan(0), model=str(model), clean=str(clean), test=str(test))
    fetch_model(plan, work / "bundle", work / "data")
    return {"bundle": str(work / "bundle"), "data": str(work / "data")}


def arguments_of(files: Mapping[str, str], method: str, work: Path) -> dict[str, Any]:
    """The component's arguments for a run of its own in ``work``."""
    run = {"evidence": str(work / "store"), "model_name": "digits", "name": "run"}
    places = {name: str(work / name) for name in ("purified", "evidence")}
    options = {
        "loading": "{}",
        "configs": json.dumps(CONFIGS),
        "seed": 0,
        "device": "cpu",
        "execution": "",
        "run": json.dumps(run),
    }
    return {**files, **places, **options, "method": method}


def outcome_of(arguments: Mapping[str, Any]) -> tuple[str, Any]:
    """Digest of the purified model, and the step's results."""
    evidence = json.loads(Path(arguments["evidence"]).read_bytes())
    return evidence["outputs"]["model"], evidence["results"]


def undisturbed(files: Mapping[str, str], method: str, work: Path) -> tuple[tuple[str, Any], float]:
    """Outcome and CPU seconds of a run without checkpoints."""
    arguments = arguments_of(files, method, work)
    whole = attempt(arguments, interval_s=0)
    return outcome_of(arguments), whole.cpu_seconds


def killed(
    files: Mapping[str, str], method: str, work: Path, *, fraction: float, expected: tuple[str, Any], seconds: float
) -> dict[str, Any]:
    """Kill the step at ``fraction`` of ``seconds``, start it again, and compare."""
    arguments = arguments_of(files, method, work)
    if not attempt(arguments, interval_s=INTERVAL_S, kill_after_s=fraction * seconds).killed:
        shutil.rmtree(work)  # it was quicker than undisturbed, and a late kill came too late
        return killed(files, method, work, fraction=0.95 * fraction, expected=expected, seconds=seconds)
    last = attempt(arguments, interval_s=INTERVAL_S)
    digest, results = outcome_of(arguments)
    return {
        "method": method,
        "kill_at_fraction": round(fraction, 3),
        "same_digest": digest == expected[0],
        "same_results": results == expected[1],
        "resumed_at_step": last.resumed_at_step,
        "cpu_seconds_undisturbed": round(seconds, 2),
        "cpu_seconds_after_restart": round(last.cpu_seconds, 2),
        "checkpoints_left": sum(path.is_file() for path in (work / "store" / ".checkpoints").rglob("*")),
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=KILLS)
    kills = parser.parse_args().kills
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started, chance, rows = datetime.now(UTC), random.Random(0), []
    work = Path(tempfile.mkdtemp(prefix="quarantine-preemption-"))
    try:
        files = make_files(work)
        wholes = {method: undisturbed(files, method, work / method) for method in METHODS}
        for number in range(kills):
            method = METHODS[number % len(METHODS)]
            expected, seconds = wholes[method]
            place = work / f"{number}"
            rows.append(killed(files, method, place, fraction=chance.random(), expected=expected, seconds=seconds))
            print(json.dumps(rows[-1]), file=sys.stderr)
        write_results("preemption", rows, command="python -m benchmarks.preemption", started=started)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
