"""What the pipeline costs over calling its functions: ``overhead.json``.

``python -m benchmarks.overhead`` runs the demo's model through the local pipeline with one method, so
that tasks run one after the other, and takes each task's wall time from the orchestrator's own log.
Then each step's function is called in a fresh process on the same inputs: its imports are timed first
(``import_seconds``), then the call (``direct_seconds``). What is left of the wall time is overhead.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.results import write_results

METHOD = "tsbd"
STEPS = (
    "fetch",
    "evaluate.before",
    f"purify.{METHOD}",
    f"evaluate.{METHOD}",
    "select",
    "export",
    "gate",
    "sign",
    "promote",
    "report",
)
TASK_LINE = re.compile(r"(\d\d):(\d\d):(\d\d)\.(\d{3}) - INFO - (Executing task|Task) \S*'([a-z0-9-]+)'\S*( finished)?")
STEP_LINE = re.compile(r"quarantine INFO (\S+) begins")
MODULES: dict[str, tuple[str, ...]] = {
    "fetch": ("components.fetch_model.step", "mlflow", "mlflow.tracking"),
    "evaluate": ("components.evaluate_model.step",),
    "purify": ("components.purify_model.step",),
    "select": ("components.select_model.step",),
    "export": ("components.export_onnx.step", "torch.onnx", "onnx", "onnxscript", "onnxruntime"),
    "gate": ("components.gate_promotion.step",),
    "sign": ("components.sign_evidence.step", "model_signing.signing", "securesystemslib.signer"),
    "promote": ("components.promote_model.step", "mlflow", "mlflow.tracking"),
    "report": ("components.report.step", "defense_core.report", "mlflow", "mlflow.tracking"),
}


def run_pipeline(work: Path) -> tuple[Any, dict[str, float]]:
    """Run it; the result, and each step's wall seconds as the orchestrator saw them."""
    from pipelines.demo import make_inputs, make_plan, write_inputs
    from pipelines.local import run_local

    model, clean, test = write_inputs(make_inputs(0), work / "inputs")
    plan = replace(make_plan(0), model=str(model), clean=str(clean), test=str(test), methods=(METHOD,))
    (work / "plan.json").write_text(json.dumps(plan.arguments()))
    result = run_local(plan, work / "run", model_name="overhead", name="overhead")
    return result, _walls(result.log.read_text("utf-8"))


def _walls(log: str) -> dict[str, float]:
    """Tasks run one after the other, so the step that began last is the task that finishes next."""
    walls: dict[str, float] = {}
    began, step = 0.0, ""
    for line in log.splitlines():
        task, named = TASK_LINE.search(line), STEP_LINE.search(line)
        if named:
            step = named[1]
        elif task:
            hours, minutes, seconds, millis = (int(task[group]) for group in range(1, 5))
            when = hours * 3600 + minutes * 60 + seconds + millis / 1000
            if task[5] == "Executing task":
                began = when
            elif task[7]:
                walls[step] = (when - began) % 86400
    return walls


def call_directly(step: str, work: Path) -> dict[str, float]:
    """Import and call one step's function in this process, on the outputs of the steps before it."""
    kind = step.partition(".")[0]
    began = time.perf_counter()
    for module in MODULES[kind]:
        importlib.import_module(module)
    imported = time.perf_counter()
    call = _call(step, work / "direct", work)
    ready = time.perf_counter()
    call()
    return {"import_seconds": imported - began, "direct_seconds": time.perf_counter() - ready}


def _call(step: str, out: Path, work: Path) -> Callable[[], object]:
    from components._runtime.evidence import read_folder, write_evidence
    from components._runtime.plan import RunSettings, plan_from_arguments

    plan = plan_from_arguments(json.loads((work / "plan.json").read_text()))
    kind, _, name = step.partition(".")
    bundle, clean, test = out / "bundle", out / "data" / "clean.npz", out / "data" / "test.npz"
    purified, evidence = out / "purified", out / "evidence"
    module = importlib.import_module(MODULES[kind][0])

    def keep(found: dict[str, Any]) -> None:
        write_evidence(evidence / f"{found['name']}.json", found)

    def sign() -> dict[str, Any]:
        from components._runtime.signing_keys import signing_key_from_environment
        from components._runtime.statements import Destination

        return module.sign_evidence(  # type: ignore[no-any-return]
            out / "selected",
            out / "onnx",
            out / "decision",
            out / "release",
            destination=Destination("overhead", "champion"),
            key=signing_key_from_environment(),
        )

    def promote() -> dict[str, Any]:
        from components._runtime.journal import open_connection

        return module.promote_model(  # type: ignore[no-any-return]
            out / "release",
            name="overhead",
            alias="champion",
            connection=open_connection(),
        )

    def report() -> None:
        from components._runtime.store import open_store

        settings = RunSettings(evidence=str(out), model_name="overhead", name="evidence")
        module.report_run(settings, open_store(str(out), "evidence"), None)

    if kind == "report":
        return report
    calls: dict[str, Callable[[], dict[str, Any]]] = {
        "fetch": lambda: module.fetch_model(plan, bundle, out / "data"),
        "evaluate": lambda: module.evaluate_model(
            bundle if name == "before" else purified,
            name=name,
            test=test,
            probes=plan.probes,
            reference=None if name == "before" else bundle,
        ),
        "purify": lambda: module.purify_model(bundle, clean, purified, method=METHOD, report=0.0),
        "select": lambda: module.select_model([purified], out / "selected", order=[METHOD]),
        "export": lambda: module.export_onnx(out / "selected", out / "onnx", test=test, probes=plan.probes),
        "gate": lambda: module.gate_promotion(read_folder(evidence), plan.policy, out / "decision"),
        "sign": sign,
        "promote": promote,
    }
    return lambda: keep(calls[kind]())


def main() -> None:
    """Entry point; with ``--step`` the child's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(call_directly(options.step, options.work)))
        return
    started = datetime.now(UTC)
    work = Path(tempfile.mkdtemp(prefix="quarantine-overhead-"))
    try:
        result, walls = run_pipeline(work)
        if result.outcome.failed_step or set(walls) < set(STEPS):
            raise SystemExit(f"the run did not reach every step: {result.outcome}, {sorted(walls)}")
        rows = []
        for step in STEPS:
            command = [sys.executable, "-m", "benchmarks.overhead", "--step", step, "--work", str(work)]
            # The child's MLflow is that of the run, so that promote finds its parent run there.
            answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=_environment(result))
            direct = json.loads(answer.stdout.splitlines()[-1])
            overhead = walls[step] - direct["direct_seconds"] - direct["import_seconds"]
            figures = {"seconds": walls[step], **direct, "overhead_seconds": overhead}
            rows.append({"step": step, **{key: round(value, 2) for key, value in figures.items()}})
        write_results("overhead", rows, command="python -m benchmarks.overhead", started=started)
    finally:
        shutil.rmtree(work)


def _environment(result: Any) -> dict[str, str]:
    from components._runtime.environment import local_environment

    return {**local_environment(result.evidence).variables, "MLFLOW_TRACKING_URI": result.tracking_uri}


if __name__ == "__main__":
    main()
