"""The compiled pipeline: golden, the same every time, without secrets, with the declared shape."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from components._runtime.image import IMAGE
from pipelines import compile as compiling
from pipelines.resources import metadata_of

CANARY = "canary-7f3a9c-secret"


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(compiling.compile_pipeline())
    return document


def test_the_golden_copy_is_the_pipeline() -> None:
    assert compiling.drift() == [], "run: python -m pipelines.compile --update"


def test_drift_is_found(tmp_path: Path) -> None:
    golden = tmp_path / "quarantine.yaml"
    golden.write_text(
        (compiling.GOLDEN / compiling.FILE_NAME).read_text().replace("name: model-quarantine", "name: other")
    )
    assert "-  name: other" in compiling.drift(tmp_path)
    assert compiling.drift(tmp_path / "missing") != []


def test_another_process_compiles_the_same_bytes_without_secrets(tmp_path: Path) -> None:
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_URI")
    environment = {**os.environ, **dict.fromkeys(names, CANARY), "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    root = Path(compiling.__file__).parent.parent
    command = [sys.executable, "-m", "pipelines.compile", "--out", str(tmp_path)]
    subprocess.run(command, check=True, cwd=root, env=environment, capture_output=True)
    data = (tmp_path / "quarantine.yaml").read_bytes()
    assert data == (compiling.GOLDEN / compiling.FILE_NAME).read_bytes()
    assert CANARY.encode() not in data
    assert str(root).encode() not in data


def test_check_exits_with_one_on_drift(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert compiling.main(["--check"]) == 0
    monkeypatch.setattr(compiling, "drift", lambda: ["-a", "+b"])
    assert compiling.main(["--check"]) == 1


def test_every_step_uses_the_one_image(compiled: dict[str, Any]) -> None:
    executors = compiled["deploymentSpec"]["executors"]
    assert {executor["container"]["image"] for executor in executors.values()} == {IMAGE}
    for executor in executors.values():
        assert "pip install" not in " ".join(executor["container"]["command"])


def test_no_step_is_cached_and_each_asks_for_memory(compiled: dict[str, Any]) -> None:
    dags = [compiled["root"]["dag"], *(part["dag"] for part in compiled["components"].values() if "dag" in part)]
    tasks = [
        task
        for dag in dags
        for name, task in dag["tasks"].items()
        if not name.startswith(("for-loop", "quarantine-steps", "exit-handler"))
    ]
    assert len(tasks) == 16
    assert all(
        not task.get("cachingOptions")
        for task in tasks
        if "iteratorPolicy" not in task and "parameterIterator" not in task
    )
    purify = compiled["deploymentSpec"]["executors"]["exec-purify-model"]["container"]["resources"]
    assert purify["resourceMemoryLimit"] == metadata_of("purify_model")["resources"]["memory_limit"]


def test_the_promote_run_measures_nothing_again() -> None:
    document = yaml.safe_load(compiling.compile_pipeline(file=compiling.PROMOTE_NAME))
    assert document["pipelineInfo"]["name"] == "model-quarantine-promote"
    steps = {name.removeprefix("exec-") for name in document["deploymentSpec"]["executors"]}
    assert steps == {
        "reopen-release",
        "gate-promotion",
        "sign-evidence",
        "promote-model",
        "attest-promotion",
        "report",
    }
    inputs = document["components"]["comp-exit-handler-1"]["dag"]["tasks"]["gate-promotion"]["inputs"]
    assert set(inputs["artifacts"]) == {"former", "reopened"}
    assert {"approvals", "approvers"} <= set(inputs["parameters"])


def test_the_gate_of_a_whole_run_is_given_the_evidence_of_every_step(compiled: dict[str, Any]) -> None:
    dags = [part["dag"] for part in compiled["components"].values() if "dag" in part]
    (gate,) = [dag["tasks"]["gate-promotion"] for dag in dags if "gate-promotion" in dag["tasks"]]
    known = set(compiled["components"]["comp-gate-promotion"]["inputDefinitions"]["artifacts"])
    assert set(gate["inputs"]["artifacts"]) == known - {"former", "reopened"}
    assert "policy" in gate["inputs"]["parameters"]


def test_the_report_is_an_exit_handler(compiled: dict[str, Any]) -> None:
    task = compiled["root"]["dag"]["tasks"]["report"]
    assert task["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    assert "taskFinalStatus" in task["inputs"]["parameters"]["status"]


@pytest.mark.parametrize("step", ["scan-backdoor", "control-model"])
def test_the_scan_is_given_no_probe_and_no_other_models(step: str, compiled: dict[str, Any]) -> None:
    inputs = compiled["components"][f"comp-{step}"]["inputDefinitions"]
    assert "probes" not in inputs["parameters"]
    assert set(inputs["artifacts"]) <= {"bundle", "data", "earlier", "reference"}
    assert "scan" in inputs["parameters"]


def test_what_is_purified_with_is_the_scans_answer(compiled: dict[str, Any]) -> None:
    dags = [part["dag"] for part in compiled["components"].values() if "dag" in part]
    (loop,) = [task for dag in dags for name, task in dag["tasks"].items() if name.startswith("for-loop")]
    assert "scan-backdoor" in loop["dependentTasks"]
    assert "scan-backdoor" in str(loop["parameterIterator"]) or "scan-backdoor" in str(loop["inputs"])


def test_purify_is_given_no_probe_and_no_registry(compiled: dict[str, Any]) -> None:
    inputs = compiled["components"]["comp-purify-model"]["inputDefinitions"]
    assert "probes" not in inputs["parameters"]
    assert set(inputs["artifacts"]) == {"bundle", "data", "made"}


def test_what_the_purifiers_left_is_mixed_once_and_measured_like_them(compiled: dict[str, Any]) -> None:
    dags = [part["dag"] for part in compiled["components"].values() if "dag" in part]
    (tasks,) = [dag["tasks"] for dag in dags if "select-model" in dag["tasks"]]
    loop = next(name for name in tasks if name.startswith("for-loop"))
    mixing = tasks["purify-model-2"]
    assert mixing["inputs"]["artifacts"]["made"]["taskOutputArtifact"]["producerTask"] == loop
    assert mixing["inputs"]["parameters"]["method"]["runtimeValue"]["constant"] == "soup"
    readers = {
        name for name, task in tasks.items() if "purify-model-2" in str(task.get("inputs", {}).get("artifacts", {}))
    }
    assert readers == {"evaluate-model-3", "select-model", "gate-promotion"}
    assert "evaluate-model-3" in str(tasks["gate-promotion"]["inputs"]["artifacts"]["mixed_evaluated"])
