"""One run per key, whoever asks: how processes that race for a run agree on one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from components._runtime.mlflow_connection import MlflowConnection
from defense_core.errors import ConfigError, RegistryConflict

if TYPE_CHECKING:
    from mlflow.entities import Run

RUN_KEY_TAG = "quarantine.run_key"
ELECTION_PARAMETER = "quarantine.election"
ELECTION_ROUNDS = 20


@dataclass(frozen=True)
class TrackedRun:
    """A run in MLflow.

    Attributes:
        run_id: MLflow's identifier.
        key: the key it is found by.
        artifact_uri: root of its artifacts.
        started_ms: start time, Unix milliseconds.
    """

    run_id: str
    key: str
    artifact_uri: str
    started_ms: int


def find_or_create_run(connection: MlflowConnection, key: str, *, name: str, tags: Mapping[str, str]) -> TrackedRun:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,249}", key):
        raise ConfigError(
            "run key is not usable",
            expected="1 to 250 letters, digits and . _ : / @ -",
            got=repr(key),
            hint="Use the pipeline run's identifier",
        )
    experiment_id = _experiment(connection)
    for _ in range(ELECTION_ROUNDS):
        run = _elect(connection, experiment_id, key)
        if run is not None:
            if run.info.status != "RUNNING":
                connection.client.update_run(run.info.run_id, status="RUNNING")
            return TrackedRun(run.info.run_id, key, run.info.artifact_uri, run.info.start_time)
        connection.client.create_run(experiment_id, run_name=name, tags={**tags, RUN_KEY_TAG: key})
    raise RegistryConflict(
        f"no single run for the key {key}",
        expected="one run",
        got=f"{ELECTION_ROUNDS} rounds in which another process withdrew it",
        hint="Run again",
    )


def _elect(connection: MlflowConnection, experiment_id: str, key: str) -> Run | None:
    """The one elected run of ``key``; ``None`` when there is no candidate.

    MLflow has no unique key for runs, but a parameter, once logged, never changes: two writers of
    one parameter agree on its value. Each candidate's fate is such a parameter. A process withdraws
    every candidate it sees but the first, and elects the first only then. Of two processes, the one
    that looks later sees the other's candidate, and must withdraw it before it can elect its own;
    that fails once the other is elected. So two are never elected, whatever the clocks say.
    """
    candidates = connection.client.search_runs(
        [experiment_id], filter_string=f"tags.`{RUN_KEY_TAG}` = '{key}'", max_results=1000
    )
    fates = {run.info.run_id: run.data.params.get(ELECTION_PARAMETER) for run in candidates}
    standing = sorted(
        (run for run in candidates if fates[run.info.run_id] != "withdrawn"),
        key=lambda run: (fates[run.info.run_id] != "elected", run.info.start_time, run.info.run_id),
    )
    if not standing:
        return None
    first, *others = standing
    for other in others:
        if _decide(connection, other.info.run_id, "withdrawn") == "elected":
            # It was elected since the search. Only a new look has it first and withdraws the rest.
            return _elect(connection, experiment_id, key)
        connection.client.delete_run(other.info.run_id)
    if fates[first.info.run_id] == "elected":
        return first
    if _decide(connection, first.info.run_id, "elected") == "elected":
        return first
    return _elect(connection, experiment_id, key)


def _decide(connection: MlflowConnection, run_id: str, fate: str) -> str:
    """Decide a candidate's fate unless it is decided; the fate it has now."""
    from mlflow.exceptions import MlflowException

    try:
        connection.client.log_param(run_id, ELECTION_PARAMETER, fate)
    except MlflowException as error:
        # Another process was first, or has already withdrawn and deleted the run.
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        return str(connection.client.get_run(run_id).data.params.get(ELECTION_PARAMETER, "withdrawn"))
    return fate


def _experiment(connection: MlflowConnection) -> str:
    from mlflow.exceptions import MlflowException

    settings, client = connection.settings, connection.client
    found = client.get_experiment_by_name(settings.experiment)
    if found is None:
        try:
            return str(client.create_experiment(settings.experiment, artifact_location=_artifact_root(connection)))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = client.get_experiment_by_name(settings.experiment)
    if found is None or found.lifecycle_stage != "active":
        raise RegistryConflict(
            f"experiment {settings.experiment} is not usable",
            expected="an active experiment",
            got="a deleted one",
            hint="Restore it, or set MLFLOW_EXPERIMENT_NAME to another",
        )
    return str(found.experiment_id)


def _artifact_root(connection: MlflowConnection) -> str | None:
    settings = connection.settings
    if settings.artifact_root:
        return settings.artifact_root
    if settings.tracking_uri.startswith("sqlite:///"):
        # MLflow's own default would be a folder in whatever directory the process happens to be.
        database = Path(settings.tracking_uri.removeprefix("sqlite:///").split("?")[0]).absolute()
        return (database.parent / "mlartifacts").as_uri()
    return None
