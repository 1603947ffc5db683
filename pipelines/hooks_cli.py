"""``quarantine hooks``: the registry's webhook, and the worker that submits runs for what it is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from defense_core.errors import ConfigError
from pipelines.kfp_settings import settings_from
from pipelines.option_groups import takes

if TYPE_CHECKING:
    from pipelines.triggers.orders import WorkerSettings

app = typer.Typer(
    help="Receive MLflow's webhooks (serve) and submit one run for each new model version (work). See docs/hooks.md.",
    no_args_is_help=True,
)

_LIMITS, _CLUSTER, _WORKER = "Limits", "Cluster", "Worker"

QueueUrl = Annotated[
    str,
    typer.Option(
        "--queue",
        envvar="QUARANTINE_QUEUE",
        help="sqlite:////path/queue.db or postgresql+psycopg://user@host/database.",
    ),
]
WatchFile = Annotated[
    str,
    typer.Option(
        "--watch",
        envvar="QUARANTINE_WATCH",
        help="Which models are watched, and their runs; a YAML file, see docs/hooks.md.",
    ),
]
Host = Annotated[str, typer.Option(envvar="QUARANTINE_HOOK_HOST", help="Address to listen on.")]
DEFAULT_QUEUE = "sqlite:///quarantine-queue.db"


@dataclass(frozen=True)
class WorkerOptions:
    """How a worker reaches the cluster, what it runs there, and how hard it tries."""

    cluster: Mapping[str, str]
    experiment: str
    node_pools: str
    package: str
    effort: WorkerSettings


def worker_options(
    *,
    endpoint: Annotated[
        str, typer.Option(help="Address of the KFP API; default: KFP_ENDPOINT.", rich_help_panel=_CLUSTER)
    ] = "",
    namespace: Annotated[
        str,
        typer.Option(
            help="Namespace of the runs, on a multi-user Kubeflow; default: KFP_NAMESPACE.", rich_help_panel=_CLUSTER
        ),
    ] = "",
    token_file: Annotated[
        str,
        typer.Option(help="File with a bearer token; default: KFP_TOKEN_FILE, KFP_TOKEN.", rich_help_panel=_CLUSTER),
    ] = "",
    ca_file: Annotated[
        str, typer.Option(help="Authorities that are trusted, PEM; default: KFP_CA_FILE.", rich_help_panel=_CLUSTER)
    ] = "",
    experiment: Annotated[
        str,
        typer.Option(
            envvar="QUARANTINE_EXPERIMENT",
            help="Experiment of the runs; default: model-quarantine.",
            rich_help_panel=_CLUSTER,
        ),
    ] = "",
    node_pools: Annotated[
        str,
        typer.Option(
            envvar="QUARANTINE_NODE_POOLS",
            help="gke, eks, bare_metal, or a file of node pools.",
            rich_help_panel=_CLUSTER,
        ),
    ] = "",
    package: Annotated[
        str,
        typer.Option(
            envvar="QUARANTINE_PACKAGE",
            help="The pipeline as `quarantine compile` wrote it; default: compiled at the first run.",
            rich_help_panel=_CLUSTER,
        ),
    ] = "",
    parallel: Annotated[
        int, typer.Option(min=1, help="Look-ups and submissions at a time.", rich_help_panel=_WORKER)
    ] = 4,
    poll_s: Annotated[
        float, typer.Option(min=0.01, help="Wait while the queue is empty, seconds.", rich_help_panel=_WORKER)
    ] = 0.2,
    lease_s: Annotated[
        float,
        typer.Option(min=1, help="How long a dead worker's work waits for another, seconds.", rich_help_panel=_WORKER),
    ] = 30.0,
    max_delay_s: Annotated[
        float,
        typer.Option(min=2, help="Longest wait between two attempts at one run, seconds.", rich_help_panel=_WORKER),
    ] = 60.0,
    max_attempts: Annotated[
        int, typer.Option(min=1, help="Attempts before work is left to the sweep.", rich_help_panel=_WORKER)
    ] = 1000,
) -> WorkerOptions:
    """The options of every process that runs a worker."""
    from pipelines.triggers.orders import WorkerSettings

    return WorkerOptions(
        {"endpoint": endpoint, "namespace": namespace, "token_file": token_file, "ca_file": ca_file},
        experiment,
        node_pools,
        package,
        WorkerSettings(
            parallel=parallel, poll_s=poll_s, lease_s=lease_s, max_delay_s=max_delay_s, max_attempts=max_attempts
        ),
    )


@app.command()
@takes(worker_options, into="worker")
def serve(
    *,
    queue: QueueUrl = DEFAULT_QUEUE,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="QUARANTINE_HOOK_PORT", min=1, max=65535, help="Port.")] = 8080,
    secret_file: Annotated[
        list[Path],
        typer.Option(
            envvar="QUARANTINE_HOOK_SECRET_FILE",
            help="File with a secret of the webhook, read again when it changes; repeatable.",
        ),
    ] = [],
    tls_certificate: Annotated[str, typer.Option(help="Certificate chain, PEM; default: plain HTTP.")] = "",
    tls_key: Annotated[str, typer.Option(help="Its private key, PEM.")] = "",
    window_s: Annotated[
        float, typer.Option(min=30, help="How far a timestamp may be from now, seconds.", rich_help_panel=_LIMITS)
    ] = 300.0,
    max_body_bytes: Annotated[
        int, typer.Option(min=1024, help="Largest body, bytes.", rich_help_panel=_LIMITS)
    ] = 262144,
    body_timeout_s: Annotated[
        float, typer.Option(min=0.1, help="Longest time for a body to come, seconds.", rich_help_panel=_LIMITS)
    ] = 10.0,
    rate_per_s: Annotated[
        float, typer.Option(min=0, help="Calls a second by one address; 0: any.", rich_help_panel=_LIMITS)
    ] = 2000.0,
    burst: Annotated[int, typer.Option(min=1, help="Calls at once by one address.", rich_help_panel=_LIMITS)] = 4000,
    retry_after_s: Annotated[
        int,
        typer.Option(min=1, max=60, help="What MLflow is asked to wait after a 503, seconds.", rich_help_panel=_LIMITS),
    ] = 10,
    with_worker: Annotated[
        bool, typer.Option("--with-worker", help="Run a worker in this process.", rich_help_panel=_WORKER)
    ] = False,
    watch: WatchFile = "",
    worker: WorkerOptions,
) -> None:
    """Receive webhooks until SIGTERM. The secret is in QUARANTINE_HOOK_SECRET or in --secret-file."""
    from pipelines.triggers.app import HookLimits
    from pipelines.triggers.secret_files import Secrets
    from pipelines.triggers.serve import Listen, serve

    if bool(tls_certificate) != bool(tls_key):
        raise ConfigError("TLS needs both files", expected="--tls-certificate and --tls-key", got="one of them")
    secrets = Secrets.from_environment(secret_file)
    log = _log("hook", secrets, queue)
    work = _work(watch, worker, log) if with_worker else None
    serve(
        queue,
        secrets,
        Listen(host, port, _path(tls_certificate), _path(tls_key)),
        HookLimits(
            max_body_bytes=max_body_bytes,
            body_timeout_s=body_timeout_s,
            rate_per_s=rate_per_s,
            burst=burst,
            retry_after_s=retry_after_s,
            window_s=window_s,
        ),
        log=log,
        work=work,
    )


@app.command()
@takes(worker_options, into="worker")
def work(
    *,
    queue: QueueUrl = DEFAULT_QUEUE,
    watch: WatchFile = "",
    host: Host = "127.0.0.1",
    metrics_port: Annotated[
        int, typer.Option(envvar="QUARANTINE_METRICS_PORT", min=0, max=65535, help="Port of /metrics; 0: none.")
    ] = 0,
    worker: WorkerOptions,
) -> None:
    """Ask the registry about what the hook wrote down, and submit runs, until SIGTERM."""
    from pipelines.triggers.serve import run_worker

    log = _log("worker", tuple, queue)
    run_worker(
        queue,
        _work(watch, worker, log),
        log=log,
        host=host,
        metrics_port=metrics_port,
    )


def _work(watch: str, worker: WorkerOptions, log: Any) -> Any:
    """What a worker needs, checked now rather than at the first delivery."""
    from components._runtime.mlflow_connection import MlflowSettings
    from pipelines.cluster_options import cluster_parameters, pools_for
    from pipelines.submit import DEFAULT_EXPERIMENT
    from pipelines.triggers.kfp_submitter import KfpSubmitter, Target, compiled_package, written_package
    from pipelines.triggers.registry import MlflowRegistry
    from pipelines.triggers.serve import Work
    from pipelines.triggers.watch import read_watch

    if not watch:
        raise ConfigError("no watch file", expected="--watch or QUARANTINE_WATCH", got="none", hint="See docs/hooks.md")
    rules, settings = read_watch(Path(watch)), settings_from(worker.cluster)
    for index, rule in enumerate(rules.rules):
        cluster_parameters(rule.plan, rules.settings_of(rule), where=f"watch.rules[{index}]: ")
    pools_for(worker.node_pools, settings.namespace)
    if worker.package:
        found = written_package(Path(worker.package), worker.node_pools)
    else:
        found = compiled_package(worker.node_pools, settings.namespace)
    target = Target(settings, found, worker.experiment or DEFAULT_EXPERIMENT)
    registry = MlflowRegistry(MlflowSettings.from_environment())
    return Work(rules, registry, KfpSubmitter(target, log=log), worker.effort)


def _log(part: str, secrets: Any, queue: str) -> Any:
    """A log that knows the secrets that this process was given."""
    import os

    from pipelines.triggers.logs import Redactor, logger
    from pipelines.triggers.tables import password_of

    given = [password_of(queue)] + [value for name, value in os.environ.items() if name in _SECRET_VARIABLES and value]
    return logger(Redactor(lambda: [*given, *(each.decode("utf-8", "replace") for each in secrets())]), part=part)


_SECRET_VARIABLES = (
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "KFP_TOKEN",
    "KFP_DEX_PASSWORD",
)


def _path(text: str) -> Path | None:
    return Path(text) if text else None
