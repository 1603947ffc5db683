"""``quarantine submit`` and ``submit-promotion``: run a pipeline on a cluster, and follow it to its end."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Annotated, Any, Self

import typer

from defense_core.errors import EXIT_PASS, Cancelled
from pipelines import options as o
from pipelines import panels
from pipelines.cluster_options import ClusterJob, cluster_job, cluster_settings
from pipelines.kfp_settings import KfpSettings
from pipelines.option_groups import takes
from pipelines.promotion_options import promotion_job

app = typer.Typer()


@dataclass(frozen=True)
class Following:
    """How a run is called, and how it is followed.

    Attributes:
        name: of the run; one name is one run.
        experiment: created if need be.
        wait: whether to follow it to its end.
        poll_s: time between two looks.
        timeout_s: longest time to follow; 0: to its end.
        as_json: for machines.
    """

    name: str
    experiment: str
    wait: bool
    poll_s: float
    timeout_s: float
    as_json: bool


def following(
    *,
    name: Annotated[
        str,
        typer.Option(help="Name of the run. One name is one run: asked again, it is followed. Default: the time."),
    ] = "",
    experiment: Annotated[str, typer.Option(help="Experiment, created if need be.")] = "model-quarantine",
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the run to its end.")] = True,
    poll_s: Annotated[float, typer.Option("--poll-s", help="Time between two looks, seconds.", min=0.01)] = 5.0,
    timeout_s: Annotated[
        float, typer.Option("--timeout-s", help="Longest time to follow, seconds; 0: to its end.", min=0.0)
    ] = 0.0,
    as_json: o.AsJson = False,
) -> Following:
    """The options of every run on a cluster. Raises ConfigError for a name that cannot be one."""
    from pipelines.submit import require_name

    name = name or datetime.now(UTC).strftime("quarantine-%Y%m%d-%H%M%S-%f")
    require_name(name, "--name")
    require_name(experiment, "--experiment")
    return Following(name, experiment, wait, poll_s, timeout_s, as_json)


@app.command(rich_help_panel=panels.CLUSTER)
@takes(cluster_settings, into="cluster")
@takes(cluster_job, into="job")
@takes(following, into="how")
def submit(cluster: KfpSettings, job: ClusterJob, how: Following) -> None:
    """Run the pipeline on a Kubeflow cluster.

    Exit codes: 0 allowed or observed, 1 denied, 2 undecided or not readable from here, 3 bad input.
    A failed step gives its own exit code. With --no-wait, 0 means submitted.
    """
    run_on_cluster(cluster, job, how)


@app.command(name="submit-promotion", rich_help_panel=panels.CLUSTER)
@takes(cluster_settings, into="cluster")
@takes(promotion_job, into="job")
@takes(following, into="how")
def submit_promotion(cluster: KfpSettings, job: ClusterJob, how: Following) -> None:
    """Resume a run that ended at its decision, on a Kubeflow cluster.

    Decides again with approvals, and promotes if allowed; nothing is scanned, purified or measured again.

    Exit codes as those of submit.
    """
    run_on_cluster(cluster, job, how)


def run_on_cluster(cluster: KfpSettings, job: ClusterJob, how: Following) -> None:
    """Submit ``job``, follow it if asked to, print what it came to, and end with its exit code."""
    from components._runtime.step import interruptible
    from pipelines.follow import follow, outcome
    from pipelines.kfp_api import connect
    from pipelines.kfp_errors import KfpError
    from pipelines.submit import Package, RunRequest, ensure_version, require_same, submit_run

    client = connect(cluster)
    version, uploaded = ensure_version(client, Package(job.package_name, job.package))
    request = RunRequest(how.name, version, job.parameters, how.experiment, job.service_account)
    submitted = submit_run(client, request)
    require_same(submitted)
    facts: dict[str, Any] = {
        "run": how.name,
        "run_id": submitted.run_id,
        "created": submitted.created,
        "experiment": how.experiment,
        "pipeline_version": version.name,
        "uploaded": uploaded,
        "evidence": f"{job.evidence.rstrip('/')}/{submitted.run_id}",
        "state": submitted.run.state,
    }
    if not how.wait:
        _finish({**facts, "exit_code": EXIT_PASS}, how.as_json)
    with _Shown(quiet=how.as_json) as shown:
        try:
            with interruptible():
                run = follow(
                    client,
                    submitted.run_id,
                    on_change=shown.change,
                    poll_s=how.poll_s,
                    timeout_s=how.timeout_s,
                )
        except Cancelled as error:
            raise Cancelled(
                error.what, hint=f"The run goes on; submit again with --name {how.name} to follow it again"
            ) from error
        except KfpError as error:
            found_again = f"The run {how.name} ({submitted.run_id}) was submitted; submit again with --name {how.name}"
            hint = f"{error.hint.rstrip('.')}. " if error.hint else ""
            raise type(error)(
                error.what, expected=error.expected, got=error.got, hint=f"{hint}{found_again} to follow it again"
            ) from error
    found = outcome(run, job.evidence)
    tasks = [{"name": task.name, "state": task.state, "error": task.error or None} for task in run.tasks]
    decided = {"decision": found.decision, "failed_step": found.failed_step or None, "why": found.why or None}
    _finish({**facts, "state": run.state, "tasks": tasks, **decided, "exit_code": found.exit_code}, how.as_json)


class _Shown:
    """The states of a run while it is followed: a table on a terminal, lines in a log, nothing beside JSON."""

    def __init__(self, *, quiet: bool) -> None:
        from rich.live import Live

        from pipelines.console import err

        self._quiet = quiet
        self._live = Live(console=err, auto_refresh=False) if err.is_terminal and not quiet else None

    def change(self, run: Any, lines: list[str]) -> None:
        """Show that states have changed."""
        from pipelines.summary import print_line

        if self._quiet:
            return
        if self._live is None:
            for line in lines:
                print_line(line)
            return
        self._live.update(_table(run), refresh=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()


def _table(run: Any) -> Any:
    from rich.markup import escape
    from rich.table import Table

    styles = {"SUCCEEDED": "green", "FAILED": "red", "CANCELED": "red", "RUNNING": "cyan"}
    drawn = Table("task", "state", title=f"{escape(run.name)}: {run.state}", title_justify="left")
    for task in run.tasks:
        style = styles.get(task.state, "dim")
        drawn.add_row(escape(task.name), f"[{style}]{escape(task.state)}[/{style}]")
    return drawn


def _finish(facts: dict[str, Any], as_json: bool) -> None:
    """Print what is known and end with the exit code."""
    from pipelines.console import coloured, out, print_json

    if as_json:
        print_json(facts)
        raise typer.Exit(facts["exit_code"])
    verb = "submitted" if facts["created"] else "there already"
    out.print(f"run:      {facts['run']}  ({verb}, {facts['run_id']}, {facts['state']})", markup=False)
    used = "uploaded" if facts["uploaded"] else "there already"
    out.print(f"pipeline: {facts['pipeline_version']}  ({used})", markup=False)
    out.print(f"evidence: {facts['evidence']}", markup=False)
    if facts.get("failed_step"):
        out.print(f"[red]{facts['failed_step']} did not pass[/red]")
    if facts.get("why"):
        out.print(facts["why"], markup=False)
    if "decision" in facts:
        out.print(f"decision: {coloured(facts['decision'])}")
    raise typer.Exit(facts["exit_code"])
