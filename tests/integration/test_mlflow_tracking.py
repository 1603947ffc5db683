"""Runs in MLflow: one per key whoever races, histories readable back, ends with the right status."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from components._runtime.journal import _figures
from components._runtime.mlflow_connection import MlflowConnection, MlflowSettings, connect
from components._runtime.run_election import ELECTION_PARAMETER, RUN_KEY_TAG
from components._runtime.tracking import (
    close_run,
    ending,
    log_files,
    log_history,
    log_metrics,
    log_parameters,
    log_tags,
    open_method_run,
    open_run,
)
from defense_core.errors import AccessDenied, ConfigError, RegistryConflict, RegistryUnavailable, StorageError
from tests.integration.mlflow_stores import MlflowServer, free_port
from tests.integration.releases import interposed

RACER = """
import sys
from components._runtime.mlflow_connection import MlflowSettings, connect
from components._runtime.tracking import open_method_run, open_run
connection = connect(MlflowSettings(tracking_uri=sys.argv[1], experiment="race"))
connection.client.search_experiments(max_results=1)
print("ready", flush=True)
for key in sys.stdin.readline().split():
    parent = open_run(connection, key, name="pipeline")
    print(key, parent.run_id, open_method_run(connection, parent, "tsbd").run_id, flush=True)
"""


def active_runs(connection: MlflowConnection, key: str) -> list[str]:
    experiment = connection.client.get_experiment_by_name(connection.settings.experiment)
    runs = connection.client.search_runs([experiment.experiment_id], filter_string=f"tags.`{RUN_KEY_TAG}` = '{key}'")
    return [run.info.run_id for run in runs]


def test_a_run_is_found_again_and_reopened(mlflow_sqlite: MlflowConnection) -> None:
    first = open_run(mlflow_sqlite, "pipeline-1", name="pipeline", tags={"source": "sha256:00"})
    close_run(mlflow_sqlite, first, "FAILED")
    again = open_run(mlflow_sqlite, "pipeline-1", name="pipeline")
    assert again == first
    stored = mlflow_sqlite.client.get_run(first.run_id)
    assert (stored.info.status, stored.data.tags["source"]) == ("RUNNING", "sha256:00")
    assert open_run(mlflow_sqlite, "pipeline-2", name="pipeline").run_id != first.run_id


def test_methods_are_nested_in_their_parent(mlflow_sqlite: MlflowConnection) -> None:
    parent = open_run(mlflow_sqlite, "pipeline-1", name="pipeline")
    tsbd = open_method_run(mlflow_sqlite, parent, "tsbd")
    control = open_method_run(mlflow_sqlite, parent, "fine_tuning")
    assert len({parent.run_id, tsbd.run_id, control.run_id}) == 3
    assert open_method_run(mlflow_sqlite, parent, "tsbd").run_id == tsbd.run_id
    tags = mlflow_sqlite.client.get_run(tsbd.run_id).data.tags
    assert (tags["mlflow.parentRunId"], tags["quarantine.method"]) == (parent.run_id, "tsbd")


def test_processes_that_race_end_up_with_one_run(mlflow_sqlite: MlflowConnection) -> None:
    keys = [f"raced-{number}" for number in range(6)]
    command = [sys.executable, "-c", RACER, mlflow_sqlite.settings.tracking_uri]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    racers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(3)
    ]
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write(" ".join(keys) + "\n")
            racer.stdin.flush()
        answers = [racer.communicate(timeout=180)[0].splitlines() for racer in racers]
    finally:
        for racer in racers:
            racer.kill()
    assert all(racer.returncode == 0 for racer in racers)
    assert answers[0] == answers[1] == answers[2]
    assert len(answers[0]) == len(keys)
    race = connect(MlflowSettings(tracking_uri=mlflow_sqlite.settings.tracking_uri, experiment="race"))
    assert [len(active_runs(race, key)) for key in keys] == [1] * len(keys)


@pytest.mark.parametrize("moment", [("search_runs", "after"), ("create_run", "after"), ("log_param", "before")])
@pytest.mark.parametrize("older", [True, False], ids=["older", "younger"])
def test_a_rival_that_acts_at_the_worst_moment(
    mlflow_sqlite: MlflowConnection, moment: tuple[str, str], older: bool
) -> None:
    """The rival's clock is far ahead or behind; start times must not decide who is right."""
    experiment = mlflow_sqlite.client.create_experiment("tests")
    rivals: list[str] = []

    def rival(number: int, name: str, when: str) -> None:
        if (name, when) == moment and not rivals:
            start = 1 if older else int(time.time() * 1000) + 10_000_000
            mlflow_sqlite.client.create_run(experiment, start_time=start, tags={RUN_KEY_TAG: "contested"})
            rivals.append(open_run(mlflow_sqlite, "contested", name="rival").run_id)

    ours = open_run(interposed(mlflow_sqlite, rival), "contested", name="ours")
    assert rivals == [ours.run_id]
    assert open_run(mlflow_sqlite, "contested", name="later").run_id == ours.run_id
    standing = [mlflow_sqlite.client.get_run(run_id) for run_id in active_runs(mlflow_sqlite, "contested")]
    assert [run.info.run_id for run in standing if run.data.params.get(ELECTION_PARAMETER) == "elected"] == [
        ours.run_id
    ]


def test_a_candidate_elected_between_look_and_withdrawal_leaves_no_other(mlflow_sqlite: MlflowConnection) -> None:
    experiment = mlflow_sqlite.client.create_experiment("tests")
    older, younger = (
        mlflow_sqlite.client.create_run(experiment, start_time=start, tags={RUN_KEY_TAG: "contested"}).info.run_id
        for start in (1, 2)
    )
    acted: list[str] = []

    def rival(number: int, name: str, when: str) -> None:
        if (name, when) == ("log_param", "before") and not acted:
            acted.append(name)
            mlflow_sqlite.client.log_param(younger, ELECTION_PARAMETER, "elected")

    assert open_run(interposed(mlflow_sqlite, rival), "contested", name="ours").run_id == younger
    assert acted == ["log_param"]
    experiments = MlflowSettings(mlflow_sqlite.settings.tracking_uri, experiment="tests")
    assert active_runs(MlflowConnection(experiments, mlflow_sqlite.client), "contested") == [younger]
    assert mlflow_sqlite.client.get_run(older).info.lifecycle_stage == "deleted"


def test_a_candidate_of_a_process_that_died_is_used(mlflow_sqlite: MlflowConnection) -> None:
    experiment = mlflow_sqlite.client.create_experiment("tests")
    dead = mlflow_sqlite.client.create_run(experiment, tags={RUN_KEY_TAG: "orphan"})
    assert open_run(mlflow_sqlite, "orphan", name="later").run_id == dead.info.run_id


def test_history_is_readable_by_phase_and_step(mlflow_sqlite: MlflowConnection) -> None:
    run = open_run(mlflow_sqlite, "pipeline-1", name="pipeline")
    history: list[dict[str, Any]] = [
        *({"phase": "unlearn", "step": step, "loss": float(step), "lr": 0.1} for step in range(1, 131)),
        {"phase": "tune", "step": 1, "loss": 0.25, "acc": None},
        {"phase": "tune", "step": 2, "loss": 0.125, "acc": 0.9},
    ]
    log_history(mlflow_sqlite, run, history)
    log_history(mlflow_sqlite, run, history)  # a retried step
    unlearn = mlflow_sqlite.client.get_metric_history(run.run_id, "unlearn/loss")
    assert [(point.step, point.value) for point in unlearn] == [(step, float(step)) for step in range(1, 131)]
    tune = mlflow_sqlite.client.get_metric_history(run.run_id, "tune/loss")
    assert [(point.step, point.value) for point in tune] == [(1, 0.25), (2, 0.125)]
    assert [point.step for point in mlflow_sqlite.client.get_metric_history(run.run_id, "tune/acc")] == [2]


def test_single_metrics_and_values_that_are_not_finite(mlflow_sqlite: MlflowConnection) -> None:
    run = open_run(mlflow_sqlite, "pipeline-1", name="pipeline")
    log_metrics(mlflow_sqlite, run, {"asr": 0.5, "odd": math.inf, "huge": 10**400, "held": True}, step=3)
    metrics = mlflow_sqlite.client.get_run(run.run_id).data.metrics
    assert metrics["asr"] == 0.5
    assert math.isnan(metrics["odd"])
    assert math.isnan(metrics["huge"])
    assert metrics["held"] == 1.0


@pytest.mark.parametrize(
    "row", [{"loss": 1.0}, {"step": 1.5, "loss": 1.0}, {"step": math.inf, "loss": 1.0}, {"step": 1, "loss": "low"}]
)
def test_rows_that_are_no_history(mlflow_sqlite: MlflowConnection, row: dict[str, object]) -> None:
    run = open_run(mlflow_sqlite, "pipeline-1", name="pipeline")
    with pytest.raises(ConfigError):
        log_history(mlflow_sqlite, run, [{"step": 0, "loss": 2.0}, row])
    assert mlflow_sqlite.client.get_run(run.run_id).data.metrics == {}


def test_figures_of_a_probe_of_any_name_are_logged_apart(mlflow_sqlite: MlflowConnection) -> None:
    names = ["/triggers/white.png", "../x", "a//b", "", "..", "a=b", "a_b", "x" * 300, "x" * 299, "blend"]
    figures = {"ra": {"value": None}, "der": None}
    probes = [{"name": name, "asr": {"value": index / 10}, **figures} for index, name in enumerate(names)]
    run = open_run(mlflow_sqlite, "odd", name="odd")
    log_metrics(mlflow_sqlite, run, {f"before/{key}": value for key, value in _figures({"probes": probes})})
    metrics = mlflow_sqlite.client.get_run(run.run_id).data.metrics
    assert sorted(metrics.values()) == [index / 10 for index in range(len(names))]
    assert metrics["before/asr/blend"] == 0.9
    assert metrics["before/asr/_triggers_white.png"] == 0.0


def test_parameters_tags_and_files(mlflow_sqlite: MlflowConnection, tmp_path: Path) -> None:
    run = open_run(mlflow_sqlite, "pipeline-1", name="pipeline")
    parameters = {"method": "tsbd", "config": {"n": 0.15, "steps": {"tune": 20}}, "names": "x" * 7000}
    log_parameters(mlflow_sqlite, run, parameters)
    log_parameters(mlflow_sqlite, run, parameters)
    log_tags(mlflow_sqlite, run, {"quarantine.model": "sha256:11"})
    (tmp_path / "evidence").mkdir()
    (tmp_path / "evidence" / "fetch.json").write_text("{}")
    (tmp_path / "report.html").write_text("<p>")
    log_files(mlflow_sqlite, run, tmp_path / "evidence", "evidence")
    log_files(mlflow_sqlite, run, tmp_path / "report.html")
    stored = mlflow_sqlite.client.get_run(run.run_id).data
    assert stored.params["config.n"] == "0.15"
    assert stored.params["config.steps.tune"] == "20"
    assert "7000 characters, sha256:" in stored.params["names"]
    assert stored.tags["quarantine.model"] == "sha256:11"
    paths = [item.path for item in mlflow_sqlite.client.list_artifacts(run.run_id)]
    assert sorted(paths) == ["evidence", "report.html"]
    assert [item.path for item in mlflow_sqlite.client.list_artifacts(run.run_id, "evidence")] == [
        "evidence/fetch.json"
    ]
    assert (tmp_path / "mlflow" / "mlartifacts").is_dir()


def test_parameters_never_change(mlflow_sqlite: MlflowConnection) -> None:
    run = open_run(mlflow_sqlite, "pipeline-1", name="pipeline")
    log_parameters(mlflow_sqlite, run, {"n": 0.15})
    with pytest.raises(RegistryConflict, match=r"expected 0\.15, got 0\.2"):
        log_parameters(mlflow_sqlite, run, {"n": 0.2, "m": 1})
    assert "m" not in mlflow_sqlite.client.get_run(run.run_id).data.params


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (ValueError("no"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_a_run_ends_with_the_status_of_its_block(
    mlflow_sqlite: MlflowConnection, error: BaseException | None, status: str
) -> None:
    run = open_run(mlflow_sqlite, "pipeline-1", name="pipeline")
    if error is None:
        with ending(mlflow_sqlite, run):
            log_metrics(mlflow_sqlite, run, {"acc": 1.0})
    else:
        with pytest.raises(type(error)), ending(mlflow_sqlite, run):
            raise error
    assert mlflow_sqlite.client.get_run(run.run_id).info.status == status


def test_the_first_error_is_raised_when_mlflow_is_gone_too(mlflow_sqlite: MlflowConnection) -> None:
    run = open_run(mlflow_sqlite, "pipeline-1", name="pipeline")

    def gone(number: int, name: str, when: str) -> None:
        raise ConnectionRefusedError("gone")

    with (
        pytest.raises(ValueError, match="the real reason") as caught,
        ending(interposed(mlflow_sqlite, gone), run),
    ):
        raise ValueError("the real reason")
    assert "could not be marked FAILED" in caught.value.__notes__[0]


@pytest.mark.parametrize("key", ["", "a'b", "x" * 251, "a b"])
def test_unusable_run_keys_are_refused(mlflow_sqlite: MlflowConnection, key: str) -> None:
    with pytest.raises(ConfigError, match="run key"):
        open_run(mlflow_sqlite, key, name="pipeline")


def test_a_deleted_experiment_is_reported(mlflow_sqlite: MlflowConnection) -> None:
    identifier = mlflow_sqlite.client.create_experiment("tests")
    mlflow_sqlite.client.delete_experiment(identifier)
    with pytest.raises(RegistryConflict, match="deleted"):
        open_run(mlflow_sqlite, "pipeline-1", name="pipeline")


# -- MLflow unreachable ----------------------------------------------------------------


def test_nothing_listens(mlflow_template: Path) -> None:
    started = time.monotonic()
    with pytest.raises(RegistryUnavailable) as caught:
        connect(MlflowSettings(tracking_uri=f"http://user:secret@127.0.0.1:{free_port()}"))
    assert time.monotonic() - started < 20
    assert caught.value.exit_code == 2
    assert "secret" not in json.dumps(caught.value.to_mapping())


def test_a_server_that_stops_answering(mlflow_server: MlflowServer) -> None:
    connection = connect(MlflowSettings(tracking_uri=mlflow_server.uri, timeout_s=1, max_retries=0))
    started = time.monotonic()
    with mlflow_server.frozen(), pytest.raises(RegistryUnavailable):
        open_run(connection, "pipeline-1", name="pipeline")
    assert time.monotonic() - started < 10


def test_one_run_for_one_key_on_a_server(mlflow_server: MlflowServer) -> None:
    connection = connect(MlflowSettings(tracking_uri=mlflow_server.uri, experiment="tracking", timeout_s=20))
    run = open_run(connection, "pipeline-1", name="pipeline")
    nested = open_method_run(connection, run, "tsbd")
    log_history(connection, nested, [{"phase": "tune", "step": step, "loss": 1.0 / step} for step in (1, 2, 4)])
    assert open_run(connection, "pipeline-1", name="pipeline") == run
    points = connection.client.get_metric_history(nested.run_id, "tune/loss")
    assert [(point.step, point.value) for point in points] == [(1, 1.0), (2, 0.5), (4, 0.25)]


def test_a_database_that_is_none(tmp_path: Path, mlflow_template: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_bytes(b"this is no database, whatever its name says" * 100)
    started = time.monotonic()
    with pytest.raises(RegistryUnavailable, match="not a database"):
        connect(MlflowSettings(tracking_uri=f"sqlite:///{path}"))
    assert time.monotonic() - started < 10


def test_a_database_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises((RegistryUnavailable, StorageError)) as caught:
        connect(MlflowSettings(tracking_uri=f"sqlite:///{tmp_path}/file/mlflow.db"))
    assert caught.value.exit_code == 2


def test_wrong_credentials_are_told_apart(mlflow_sqlite: MlflowConnection) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

    def refuse(number: int, name: str, when: str) -> None:
        raise MlflowException("Permission denied", error_code=PERMISSION_DENIED)

    with pytest.raises(AccessDenied):
        open_run(interposed(mlflow_sqlite, refuse), "pipeline-1", name="pipeline")
