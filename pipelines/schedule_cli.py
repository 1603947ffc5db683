"""``quarantine schedule``: recurring runs on a cluster, by name; each can be undone."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from defense_core.errors import ConfigError
from pipelines import options as o
from pipelines.cluster_options import ClusterJob, cluster_job, cluster_settings
from pipelines.kfp_settings import KfpSettings
from pipelines.option_groups import takes

app = typer.Typer(
    help="Run the pipeline on a cluster again and again: without catch-up, one run at a time.", no_args_is_help=True
)

Name = Annotated[str, typer.Argument(help="Name of the schedule.", show_default=False)]


@app.command(name="set")
@takes(cluster_settings, into="cluster")
@takes(cluster_job, into="job")
def set_schedule(
    cluster: KfpSettings,
    job: ClusterJob,
    name: Name,
    cron: Annotated[str, typer.Option(help="'0 2 * * *': every night at 02:00, in the cluster's zone (UTC).")],
    experiment: Annotated[str, typer.Option(help="Experiment of its runs, created if need be.")] = "model-quarantine",
    enabled: Annotated[bool, typer.Option("--enabled/--disabled", help="Whether it starts runs.")] = True,
    as_json: o.AsJson = False,
) -> None:
    """Create the schedule, or replace one that has other settings. The same command again changes nothing."""
    from pipelines.cron import parse_cron
    from pipelines.kfp_api import connect
    from pipelines.schedule import ScheduleRequest, apply_schedule
    from pipelines.submit import Package, ensure_version, require_name

    # Before anything is uploaded.
    parse_cron(cron)
    require_name(name, "the schedule's name")
    require_name(experiment, "--experiment")
    client = connect(cluster)
    version, _ = ensure_version(client, Package(job.package_name, job.package))
    request = ScheduleRequest(name, cron, version, job.parameters, experiment, job.service_account, enabled)
    applied = apply_schedule(client, request)
    _say({**_facts(applied.schedule), "action": applied.action, "removed": list(applied.removed)}, as_json)


@app.command(name="list")
@takes(cluster_settings, into="cluster")
def list_schedules(cluster: KfpSettings, as_json: o.AsJson = False) -> None:
    """List the schedules of the namespace."""
    from pipelines.console import print_json, table
    from pipelines.kfp_api import connect

    rows = [_facts(each) for each in connect(cluster).schedules()]
    if as_json:
        print_json(rows)
        return
    columns = ("name", "cron", "enabled", "pipeline_version_id", "schedule_id")
    table("Schedules", columns, ([str(row[column]) for column in columns] for row in rows))


@app.command()
@takes(cluster_settings, into="cluster")
def enable(cluster: KfpSettings, name: Name, as_json: o.AsJson = False) -> None:
    """Let a schedule start runs again."""
    _switch(cluster, name, enabled=True, as_json=as_json)


@app.command()
@takes(cluster_settings, into="cluster")
def disable(cluster: KfpSettings, name: Name, as_json: o.AsJson = False) -> None:
    """Stop a schedule from starting runs; it can be enabled again. Runs that go on are left alone."""
    _switch(cluster, name, enabled=False, as_json=as_json)


@app.command()
@takes(cluster_settings, into="cluster")
def delete(cluster: KfpSettings, name: Name, as_json: o.AsJson = False) -> None:
    """Remove a schedule. Its runs, also one that goes on, stay. Where there is none, nothing is done."""
    from pipelines.console import out, print_json
    from pipelines.kfp_api import connect
    from pipelines.schedule import delete as delete_schedule

    removed = [each.schedule_id for each in delete_schedule(connect(cluster), name)]
    if as_json:
        print_json({"name": name, "removed": removed})
        return
    out.print(f"removed: {', '.join(removed)}" if removed else f"no schedule is called {name}", markup=False)


def _switch(cluster: KfpSettings, name: str, *, enabled: bool, as_json: bool) -> None:
    from pipelines.kfp_api import connect
    from pipelines.schedule import enable as enable_schedule

    found = enable_schedule(connect(cluster), name, enabled=enabled)
    if not found:
        raise ConfigError(f"schedule {name} was removed at this moment", expected="a schedule", got="none")
    _say({**_facts(found[-1]), "action": "enabled" if enabled else "disabled"}, as_json)


def _facts(schedule: Any) -> dict[str, Any]:
    return {
        "name": schedule.name,
        "schedule_id": schedule.schedule_id,
        "cron": schedule.cron,
        "enabled": schedule.enabled,
        "pipeline_version_id": schedule.version.version_id,
        "service_account": schedule.service_account,
        "max_concurrency": schedule.max_concurrency,
        "catch_up": schedule.catch_up,
        "description": schedule.description,
    }


def _say(facts: dict[str, Any], as_json: bool) -> None:
    from pipelines.console import out, print_json

    if as_json:
        print_json(facts)
        return
    state = "enabled" if facts["enabled"] else "disabled"
    line = f"{facts['action']}: {facts['name']}  {facts['cron']}  ({state}, {facts['schedule_id']})"
    out.print(line, markup=False)
