"""What the KFP API knows, as frozen records: pipeline versions, runs with their tasks, schedules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pipelines.kfp_errors import NotKfpV2

FINISHED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
"""States of a run or task that do not change any more."""


@dataclass(frozen=True)
class PipelineVersion:
    """One uploaded pipeline definition; ``name`` is made of the digest of its intermediate representation."""

    pipeline_id: str
    version_id: str
    name: str


@dataclass(frozen=True)
class Task:
    """One task of a run.

    Attributes:
        task_id: the cluster's name for it; the same pipeline task in a parallel branch has another.
        name: as the pipeline calls it.
        state: ``PENDING``, ``RUNNING``, ``SUCCEEDED``, ``SKIPPED``, ``FAILED``, ``CANCELED``….
        error: what the cluster says about a failure; empty otherwise.
    """

    task_id: str
    name: str
    state: str
    error: str = ""


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        state: like :attr:`Task.state`; ``PENDING`` right after it was submitted.
        created_at: in UTC; the order in which runs of one name came.
        tasks: in the order in which they were created.
    """

    run_id: str
    name: str
    state: str
    created_at: datetime
    experiment_id: str
    version: PipelineVersion
    parameters: Mapping[str, Any] = field(default_factory=dict)
    service_account: str = ""
    description: str = ""
    error: str = ""
    tasks: tuple[Task, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether the state is final."""
        return self.state in FINISHED


@dataclass(frozen=True)
class Schedule:
    """One recurring run.

    Attributes:
        cron: six fields, seconds first.
    """

    schedule_id: str
    name: str
    cron: str
    enabled: bool
    created_at: datetime
    description: str
    experiment_id: str
    version: PipelineVersion
    parameters: Mapping[str, Any]
    service_account: str
    max_concurrency: int
    catch_up: bool


def run_of(answer: Any) -> Run:
    """A run from the generated client's model. Raises NotKfpV2 where it has no id."""
    details = answer.run_details.task_details if answer.run_details else None
    return Run(
        run_id=required(answer.run_id, "run_id"),
        name=answer.display_name or "",
        state=_state(answer.state),
        created_at=_time(answer.created_at),
        experiment_id=answer.experiment_id or "",
        version=_reference(answer.pipeline_version_reference),
        parameters=_parameters(answer.runtime_config),
        service_account=answer.service_account or "",
        description=answer.description or "",
        error=_error(answer.error),
        tasks=tuple(_task(each) for each in sorted(details or [], key=lambda each: _time(each.create_time))),
    )


def schedule_of(answer: Any) -> Schedule:
    """A schedule from the generated client's model. Raises NotKfpV2 where it has no id."""
    cron = answer.trigger.cron_schedule.cron if answer.trigger and answer.trigger.cron_schedule else ""
    return Schedule(
        schedule_id=required(answer.recurring_run_id, "recurring_run_id"),
        name=answer.display_name or "",
        cron=cron or "",
        # A schedule that was just made may have no status yet; its mode says what was asked for.
        enabled=(answer.mode or "ENABLE") == "ENABLE" and answer.status != "DISABLED",
        created_at=_time(answer.created_at),
        description=answer.description or "",
        experiment_id=answer.experiment_id or "",
        version=_reference(answer.pipeline_version_reference),
        parameters=_parameters(answer.runtime_config),
        service_account=answer.service_account or "",
        max_concurrency=int(answer.max_concurrency or 0),
        catch_up=not answer.no_catchup,
    )


def version_of(answer: Any) -> PipelineVersion:
    """A pipeline version from the generated client's model. Raises NotKfpV2 where it has no id."""
    return PipelineVersion(
        required(answer.pipeline_id, "pipeline_id"),
        required(answer.pipeline_version_id, "pipeline_version_id"),
        answer.name or answer.display_name or "",
    )


def required(value: str | None, name: str) -> str:
    """``value``, or NotKfpV2 where the answer lacks it."""
    if not value:
        raise NotKfpV2("the endpoint's answer lacks an id", expected=name, got="an object without it")
    return value


def _task(answer: Any) -> Task:
    return Task(
        answer.task_id or answer.display_name or "",
        answer.display_name or answer.task_id or "",
        _state(answer.state),
        _error(answer.error),
    )


def _state(state: str | None) -> str:
    return "PENDING" if not state or state == "RUNTIME_STATE_UNSPECIFIED" else state


def _reference(reference: Any) -> PipelineVersion:
    if reference is None:
        return PipelineVersion("", "", "")
    return PipelineVersion(reference.pipeline_id or "", reference.pipeline_version_id or "", "")


def _parameters(config: Any) -> Mapping[str, Any]:
    return dict(config.parameters or {}) if config is not None else {}


def _error(status: Any) -> str:
    return (
        str(status.message or f"code {status.code}") if status is not None and (status.message or status.code) else ""
    )


def _time(value: datetime | None) -> datetime:
    if value is None:
        return datetime.fromtimestamp(0, UTC)
    return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)
