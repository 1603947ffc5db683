"""Schedules on a cluster: KFP recurring runs, one by name, without catch-up, one run at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kfp_server_api import (
    V2beta1CronSchedule,
    V2beta1PipelineVersionReference,
    V2beta1RecurringRun,
    V2beta1RuntimeConfig,
    V2beta1Trigger,
)

from defense_core import __version__
from defense_core.config import digest
from pipelines.cron import parse_cron
from pipelines.kfp_api import KfpClient
from pipelines.kfp_errors import AnswerLost, NotOnCluster
from pipelines.kfp_records import PipelineVersion, Schedule
from pipelines.submit import DEFAULT_EXPERIMENT, ensure_experiment, require_name, same_parameters

MAX_CONCURRENCY = 1
_SETTINGS = re.compile(r"settings (sha256:[0-9a-f]{64})")


@dataclass(frozen=True)
class ScheduleRequest:
    """A schedule that is wanted.

    Attributes:
        name: by which it is found again; unique within the namespace.
        cron: five or six fields; six afterwards.
        version: the uploaded pipeline, from :func:`pipelines.submit.ensure_version`.
        parameters: pipeline parameters, JSON types.
        experiment: name of the experiment that its runs belong to.
        service_account: Kubernetes account that the pods run as; empty: the installation's own.
        enabled: whether it starts runs.
    """

    name: str
    cron: str
    version: PipelineVersion
    parameters: Mapping[str, Any]
    experiment: str = DEFAULT_EXPERIMENT
    service_account: str = ""
    enabled: bool = True

    def __post_init__(self) -> None:
        require_name(self.name, "schedule name")
        require_name(self.experiment, "experiment")
        object.__setattr__(self, "cron", parse_cron(self.cron))

    @property
    def description(self) -> str:
        """What the schedule's description says; the digest tells whether its settings are these."""
        said = {
            "cron": self.cron,
            "version": self.version.version_id,
            "parameters": dict(self.parameters),
            "experiment": self.experiment,
            "service_account": self.service_account,
        }
        return f"Model Quarantine {__version__}, settings {digest(said)}"


@dataclass(frozen=True)
class AppliedSchedule:
    """A schedule as it is now.

    Attributes:
        action: ``created``, ``replaced``, ``enabled``, ``disabled`` or ``unchanged``.
        removed: ids of the schedules that it took the place of.
    """

    schedule: Schedule
    action: str
    removed: tuple[str, ...] = ()


def apply_schedule(client: KfpClient, request: ScheduleRequest) -> AppliedSchedule:
    """Make the schedule called ``request.name`` what ``request`` says; asked twice, the second changes nothing.

    KFP cannot change a recurring run. Other settings are made a new one, which is created disabled (so that the
    endpoint has accepted it), then the old one is disabled, the new one enabled, and the old one removed. Two of a
    name are never enabled at once, and whatever interrupts this, the next call finishes it.

    Raises:
        KfpError: the endpoint does not do it; what is there still works as it did.
    """
    experiment_id = ensure_experiment(client, request.experiment)
    present = client.schedules(request.name)
    matching = [each for each in present if _same(each, request, experiment_id)]
    # An enabled one is kept, so that a repeated call does not touch it.
    kept = next((each for each in matching if each.enabled), matching[0] if matching else None)
    created = kept is None
    if kept is None:
        kept = _create(client, request, experiment_id, {each.schedule_id for each in present})
    others = [each for each in present if each.schedule_id != kept.schedule_id]
    for each in others:
        if each.enabled:
            client.enable_schedule(each.schedule_id, enabled=False)
    switched = kept.enabled != request.enabled
    if switched:
        client.enable_schedule(kept.schedule_id, enabled=request.enabled)
    for each in others:
        client.delete_schedule(each.schedule_id)
    action = "unchanged"
    if others:
        action = "replaced"
    elif created:
        action = "created"
    elif switched:
        action = "enabled" if request.enabled else "disabled"
    return AppliedSchedule(
        _one(client, request.name, kept.schedule_id), action, tuple(each.schedule_id for each in others)
    )


def enable(client: KfpClient, name: str, *, enabled: bool) -> list[Schedule]:
    """Let the schedule start runs again, or stop it from starting any; runs that go on are left alone.

    Raises:
        NotOnCluster: no schedule of this name.
    """
    found = _present(client, name)
    # Of several, left by an interrupted replacement, only the latest may start runs.
    for each in found[:-1]:
        client.enable_schedule(each.schedule_id, enabled=False)
    if found[-1].enabled != enabled:
        client.enable_schedule(found[-1].schedule_id, enabled=enabled)
    return client.schedules(name)


def delete(client: KfpClient, name: str) -> list[Schedule]:
    """Remove every schedule called ``name``; its runs stay. What was removed; empty where there was none."""
    found = client.schedules(name)
    for each in found:
        client.delete_schedule(each.schedule_id)
    return found


def _present(client: KfpClient, name: str) -> list[Schedule]:
    found = client.schedules(name)
    if not found:
        raise NotOnCluster(
            f"no schedule is called {name}", expected="a name that `quarantine schedule list` shows", got=repr(name)
        )
    return found


def _one(client: KfpClient, name: str, schedule_id: str) -> Schedule:
    found = [each for each in client.schedules(name) if each.schedule_id == schedule_id]
    if not found:
        raise NotOnCluster(
            f"schedule {name} was removed by somebody else at this moment", expected=schedule_id, got="nothing"
        )
    return found[0]


def _create(client: KfpClient, request: ScheduleRequest, experiment_id: str, known: set[str]) -> Schedule:
    try:
        return client.create_schedule(_body(request, experiment_id))
    except AnswerLost:
        # It is disabled, so one that comes later starts nothing; the next call removes it.
        for each in client.schedules(request.name):
            if each.schedule_id not in known and _same(each, request, experiment_id):
                return each
        raise


def _body(request: ScheduleRequest, experiment_id: str) -> V2beta1RecurringRun:
    return V2beta1RecurringRun(
        display_name=request.name,
        description=request.description,
        experiment_id=experiment_id,
        pipeline_version_reference=V2beta1PipelineVersionReference(
            pipeline_id=request.version.pipeline_id, pipeline_version_id=request.version.version_id
        ),
        runtime_config=V2beta1RuntimeConfig(parameters=dict(request.parameters)),
        service_account=request.service_account or None,
        trigger=V2beta1Trigger(cron_schedule=V2beta1CronSchedule(cron=request.cron)),
        # Disabled first: a schedule that is enabled at once could run beside the one that it replaces.
        mode="DISABLE",
        no_catchup=True,
        max_concurrency=str(MAX_CONCURRENCY),
    )


def _same(present: Schedule, request: ScheduleRequest, experiment_id: str) -> bool:
    """Whether ``present`` is ``request``: by its digest, and by every field that somebody may have changed since."""
    found, wanted = _SETTINGS.search(present.description), _SETTINGS.search(request.description)
    return (
        found is not None
        and wanted is not None
        and found[1] == wanted[1]
        and present.cron == request.cron
        and present.version.version_id == request.version.version_id
        and present.experiment_id == experiment_id
        and present.max_concurrency == MAX_CONCURRENCY
        and not present.catch_up
        and same_parameters(present.parameters, request.parameters)
    )
