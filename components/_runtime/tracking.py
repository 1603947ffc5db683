"""Runs in MLflow: one parent per pipeline run, one nested run per method.

Steps run in processes of their own, at the same time, and are retried. So a run is never passed
around: each step finds it by its key, the tag ``quarantine.run_key``, or creates it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from components._runtime.mlflow_connection import MlflowConnection, mlflow_errors
from components._runtime.run_election import TrackedRun, find_or_create_run
from defense_core.errors import ConfigError, QuarantineError, RegistryConflict
from defense_core.files import sha256_bytes

if TYPE_CHECKING:
    from mlflow.entities import Metric

METHOD_TAG = "quarantine.method"
MAX_VALUE_CHARACTERS = 6000
BATCH_ENTITIES = 100

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


def open_run(
    connection: MlflowConnection,
    key: str,
    *,
    name: str,
    tags: Mapping[str, str] | None = None,
) -> TrackedRun:
    """The parent run of the pipeline run ``key``, running; created if there is none.

    Processes that race for one key end up with one run (see ``run_election``).
    """
    with mlflow_errors(f"open the run {key}", connection.settings):
        return find_or_create_run(connection, key, name=name, tags=tags or {})


def open_method_run(
    connection: MlflowConnection,
    parent: TrackedRun,
    method: str,
    *,
    tags: Mapping[str, str] | None = None,
) -> TrackedRun:
    """The run of ``method`` nested in ``parent``, running; created if there is none."""
    with mlflow_errors(f"open the run of {method}", connection.settings):
        own = {"mlflow.parentRunId": parent.run_id, METHOD_TAG: method, **(tags or {})}
        return find_or_create_run(connection, f"{parent.key}/{method}", name=method, tags=own)


@contextmanager
def ending(connection: MlflowConnection, run: TrackedRun) -> Iterator[TrackedRun]:
    """End ``run`` with the block: FINISHED, FAILED on an exception, KILLED on Ctrl-C.

    If MLflow is gone by then, the block's own exception is the one that is raised.
    """
    try:
        yield run
    except BaseException as error:
        status: Status = "FAILED" if isinstance(error, Exception) else "KILLED"
        try:
            close_run(connection, run, status)
        except QuarantineError as second:
            error.add_note(f"The run {run.run_id} could not be marked {status}: {second}")
        raise
    close_run(connection, run, "FINISHED")


def close_run(connection: MlflowConnection, run: TrackedRun, status: Status) -> None:
    """End ``run`` with ``status``."""
    with mlflow_errors(f"end the run {run.run_id}", connection.settings):
        connection.client.set_terminated(run.run_id, status=status)


def log_parameters(connection: MlflowConnection, run: TrackedRun, parameters: Mapping[str, Any]) -> None:
    """Log parameters, nested mappings with dotted names; logging the same values again does nothing.

    A value of more than 6000 characters (MLflow's limit) is kept as its head and its SHA-256.

    Raises:
        RegistryConflict: the run already holds another value; parameters never change.
    """
    from mlflow.entities import Param

    flat = {name: _shortened(value) for name, value in _flatten(parameters)}
    with mlflow_errors(f"log parameters to the run {run.run_id}", connection.settings):
        present = connection.client.get_run(run.run_id).data.params
        for name, value in flat.items():
            if present.get(name, value) != value:
                raise RegistryConflict(
                    f"parameter {name} of the run {run.run_id} differs",
                    expected=present[name],
                    got=value,
                    hint="Use another run key for another configuration",
                )
        fresh = [Param(name, value) for name, value in flat.items() if name not in present]
        for part in _batches(fresh):
            connection.client.log_batch(run.run_id, params=part)


def log_metrics(connection: MlflowConnection, run: TrackedRun, metrics: Mapping[str, float], *, step: int = 0) -> None:
    """Log metrics at one step."""
    log_history(connection, run, [{"step": step, **metrics}])


def log_history(connection: MlflowConnection, run: TrackedRun, history: Iterable[Mapping[str, Any]]) -> None:
    """Log a purifier's history: rows of ``step``, optional ``phase`` and numbers.

    ``{"phase": "unlearn", "step": 3, "loss": 0.2}`` becomes the metric ``unlearn/loss`` at step 3;
    ``None`` is left out. Times are derived from the step, so a retried step logs the same points.

    Raises:
        ConfigError: a row without a whole ``step``, or with something that is no number.
    """
    points = [point for row in history for point in _points(row, run.started_ms)]
    with mlflow_errors(f"log metrics to the run {run.run_id}", connection.settings):
        for part in _batches(points):
            connection.client.log_batch(run.run_id, metrics=part)


def log_tags(connection: MlflowConnection, run: TrackedRun, tags: Mapping[str, str]) -> None:
    """Set tags, digests among them."""
    from mlflow.entities import RunTag

    with mlflow_errors(f"set tags of the run {run.run_id}", connection.settings):
        for part in _batches([RunTag(key, str(value)) for key, value in tags.items()]):
            connection.client.log_batch(run.run_id, tags=part)


def log_files(connection: MlflowConnection, run: TrackedRun, path: Path, folder: str = "") -> None:
    """Upload a file, or what a folder holds, into ``folder`` of the run's artifacts."""
    with mlflow_errors(f"upload {path} to the run {run.run_id}", connection.settings):
        if path.is_dir():
            connection.client.log_artifacts(run.run_id, str(path), folder or None)
        else:
            connection.client.log_artifact(run.run_id, str(path), folder or None)


# -- values ----------------------------------------------------------------------------


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


def _shortened(value: str) -> str:
    if len(value) <= MAX_VALUE_CHARACTERS:
        return value
    return f"{value[:1000]}… ({len(value)} characters, {sha256_bytes(value.encode())})"


def _points(row: Mapping[str, Any], started_ms: int) -> Iterator[Metric]:
    from mlflow.entities import Metric

    # Reports bring torch along; the steps that only open or find a run do without.
    from defense_core.report_text import number

    step, phase = number(row.get("step")), row.get("phase")
    if step is None or not step.is_integer():
        raise ConfigError(
            "history row has no step", expected="a whole number", got=repr(row.get("step")), hint="Number the rows"
        )
    prefix = f"{phase}/" if phase else ""
    for name, value in row.items():
        if name in ("step", "phase") or value is None:
            continue
        if not isinstance(value, int | float):
            raise ConfigError(
                f"metric {name} is no number", expected="a number", got=repr(value), hint="Log it as a tag"
            )
        # MLflow's SQL stores keep NaN but turn infinities into the largest float. A truth value is 0 or 1.
        finite = number(+value)
        yield Metric(prefix + name, math.nan if finite is None else finite, started_ms + int(step), int(step))


def _batches(values: Sequence[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(values), BATCH_ENTITIES):
        yield list(values[start : start + BATCH_ENTITIES])
