"""The demo, timed (``demo.json``), and what it achieves over seeds (``demo-quality.json``).

``python -m benchmarks.demo`` runs ``quarantine demo`` as a user does, in a process of its own, and
measures it from outside; then it purifies the demo's model for five seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.results import write_results
from defense_core.data import split_clean_set
from defense_core.evaluate import evaluate
from defense_core.progress import NullProgress
from defense_core.purify import METHODS
from pipelines.demo import TASK, make_inputs

SEEDS = 5
SAMPLE_EVERY_S = 0.1


def time_demo() -> list[dict[str, Any]]:
    """Rows of ``demo.json``: seconds of each step by its own record, and the whole from outside.

    ``peak_mb`` is the sum of the proportional set sizes (memory that processes share is counted once)
    of the command and all that it started, at its highest; for a step, while the step ran.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "demo"
        command = [sys.executable, "-m", "pipelines.cli", "demo", "--out", str(out), "--json"]
        samples: list[tuple[float, float]] = []
        began = time.time()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            sampler = threading.Thread(target=_sample, args=(process.pid, samples))
            sampler.start()
            output, _ = process.communicate()
            sampler.join()
        total = time.time() - began
        result = json.loads(output)
        if result["decision"] != "allow":
            raise SystemExit(f"the demo was not allowed: {result}")
        steps = _steps(Path(result["evidence"]), Path(result["log"]))
        # The report says when it begins only; nothing comes after it.
        steps = [{**step, "ended": began + total} if step["step"] == "report" else step for step in steps]
    first = min(step["began"] for step in steps)
    rows = [_row("train, upload and start", began, first, samples)]
    rows += [_row(step["step"], step["began"], step["ended"], samples) for step in steps]
    return [*rows, {"step": "total", "seconds": round(total, 1), "peak_mb": _peak(samples, began, began + total)}]


def _steps(evidence: Path, log: Path) -> list[dict[str, Any]]:
    """When each step began (its first log line) and ended (its verdict's line)."""
    marks: dict[str, dict[str, Any]] = {}
    names = [*sorted(path.stem for path in evidence.glob("*.json")), "report"]
    for raw in log.read_text("utf-8").splitlines():
        line = raw.strip()
        for name in names:
            if f"quarantine INFO {name} begins" in line:
                marks[name] = {"step": name, "began": _when(line), "ended": _when(line)}
            elif f"quarantine INFO {name}: " in line and name in marks:
                marks[name]["ended"] = _when(line)
    return sorted(marks.values(), key=lambda mark: float(mark["began"]))


def _when(line: str) -> float:
    return datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").timestamp()


def _sample(pid: int, samples: list[tuple[float, float]]) -> None:
    try:
        root = psutil.Process(pid)
        while root.is_running() and root.status() != psutil.STATUS_ZOMBIE:
            total = 0
            for process in [root, *root.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            samples.append((time.time(), total / 1e6))
            time.sleep(SAMPLE_EVERY_S)
    except psutil.NoSuchProcess:
        return


def _peak(samples: list[tuple[float, float]], began: float, ended: float) -> float:
    return round(max((mb for when, mb in samples if began <= when <= ended), default=0.0))


def _row(step: str, began: float, ended: float, samples: list[tuple[float, float]]) -> dict[str, Any]:
    return {"step": step, "seconds": round(ended - began, 1), "peak_mb": _peak(samples, began, ended)}


def quality_rows(seed: int) -> list[dict[str, Any]]:
    """Rows of ``demo-quality.json`` for one seed: TSBD and the control on a model trained with that seed."""
    inputs = make_inputs(seed)
    splits = split_clean_set(inputs.clean, seed=seed, select=0.2, report=0.0)
    rows = []
    for method in ("tsbd", "fine_tuning"):
        row = METHODS[method]
        result = row.function(
            inputs.model, splits, row.config(), task=TASK, seed=seed, device="cpu", progress=NullProgress()
        )
        figures = evaluate(
            result.model, inputs.test, task=TASK, probes=(inputs.probe,), reference=inputs.model
        ).to_results()
        rows.append({"seed": seed, "method": method, **_figures(figures)})
    return rows


def _figures(results: Mapping[str, Any]) -> dict[str, Any]:
    probe = results["probes"][0]
    return {
        "acc_before": results["acc_before"]["value"],
        "acc_after": results["acc"]["value"],
        "asr_before": probe["asr_before"]["value"],
        "asr_after": probe["asr"]["value"],
        "ra_after": probe["ra"]["value"],
        "der": probe["der"],
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("time", "quality"), help="measure one of the two")
    options = parser.parse_args()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    if options.only != "quality":
        started = datetime.now(UTC)
        write_results("demo", time_demo(), command="python -m benchmarks.demo --only time", started=started)
    if options.only != "time":
        started = datetime.now(UTC)
        rows = [row for seed in range(SEEDS) for row in quality_rows(seed)]
        write_results("demo-quality", rows, command="python -m benchmarks.demo --only quality", started=started)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
