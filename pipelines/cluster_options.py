"""What ``quarantine submit`` and ``quarantine schedule`` are given: the cluster, the plan, and where the records go."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

from components._runtime.addresses import split_address
from components._runtime.plan import Loading, Plan, RunSettings, run_settings
from defense_core.config import require
from defense_core.errors import ConfigError
from pipelines import options as o
from pipelines.compile import FILE_NAME
from pipelines.kfp_settings import VARIABLES, KfpSettings, settings_from
from pipelines.model_options import pinned_loading
from pipelines.option_groups import takes
from pipelines.plan_options import Request, run_request

if TYPE_CHECKING:
    from pipelines.node_pools import NodePools

MAX_SEED = 2**53
"""Kubeflow Pipelines hands numbers on as floats, which hold every whole number up to here."""
_CLUSTER = "Cluster"

# Shared by both groups: it names where the runs are, and the node pools must be for the same place.
Namespace = Annotated[
    str,
    typer.Option(
        help="Namespace of the runs, on a multi-user Kubeflow; default: KFP_NAMESPACE.", rich_help_panel=_CLUSTER
    ),
]

ServiceAccount = Annotated[
    str, typer.Option(help="Account of the run's pods; default: that of the node pools.", rich_help_panel=_CLUSTER)
]


@dataclass(frozen=True)
class ClusterJob:
    """What a run or a schedule on a cluster is made of, but for its name.

    Attributes:
        package_name: name of the pipeline on the cluster.
        package: its compiled definition.
        parameters: of the pipeline.
        evidence: root of the evidence store.
        service_account: that the run's pods run as; empty: the installation's own.
    """

    package_name: str
    package: bytes = field(repr=False)
    parameters: Mapping[str, Any] = field(repr=False)
    evidence: str
    service_account: str


def cluster_settings(
    *,
    endpoint: Annotated[
        str, typer.Option(help="Address of the KFP API; default: KFP_ENDPOINT.", rich_help_panel=_CLUSTER)
    ] = "",
    namespace: Namespace = "",
    token_file: Annotated[
        str,
        typer.Option(help="File with a bearer token; default: KFP_TOKEN_FILE, KFP_TOKEN.", rich_help_panel=_CLUSTER),
    ] = "",
    kube_context: Annotated[
        str,
        typer.Option(
            help="Context of the kube configuration, instead of an endpoint; default: KFP_KUBE_CONTEXT.",
            rich_help_panel=_CLUSTER,
        ),
    ] = "",
    dex_username: Annotated[
        str,
        typer.Option(
            help="Log in by dex's form, with the password in KFP_DEX_PASSWORD; default: KFP_DEX_USERNAME.",
            rich_help_panel=_CLUSTER,
        ),
    ] = "",
    dex_password_file: Annotated[
        str, typer.Option(help="File with that password; default: KFP_DEX_PASSWORD_FILE.", rich_help_panel=_CLUSTER)
    ] = "",
    ca_file: Annotated[
        str, typer.Option(help="Authorities that are trusted, PEM; default: KFP_CA_FILE.", rich_help_panel=_CLUSTER)
    ] = "",
) -> KfpSettings:
    """The options that say which cluster, and who asks."""
    return settings_from(
        {
            "endpoint": endpoint,
            "namespace": namespace,
            "token_file": token_file,
            "kube_context": kube_context,
            "dex_username": dex_username,
            "dex_password_file": dex_password_file,
            "ca_file": ca_file,
        }
    )


ClusterTest = Annotated[str, typer.Option(help="Test set, s3://…; default: a fifth of the clean set.")]
ClusterControls = Annotated[
    str, typer.Option(help="s3://bucket/prefix that keeps positive controls: one of the same work is not made again.")
]
ClusterPool = Annotated[str, typer.Option(help="Calibration pool of the scan, s3://…; default: one that comes along.")]


@takes(run_request, into="request", instead={"test": ClusterTest, "pool": ClusterPool, "controls": ClusterControls})
@takes(pinned_loading, into="loading")
def cluster_job(
    *,
    model: Annotated[str, typer.Option(help="s3://bucket/key[?versionId=…], models:/name/3 or models:/name@alias.")],
    clean: Annotated[str, typer.Option(help="Clean set, s3://…, .parquet or .npz.")],
    evidence: Annotated[str, typer.Option(help="Root of the evidence store, s3://bucket/prefix.")],
    request: Request,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    loading: Loading,
    node_pools: o.NodePoolsFile = "",
    service_account: ServiceAccount = "",
    namespace: Namespace = "",
) -> ClusterJob:
    """The options of ``quarantine run`` that make sense on a cluster, and its own."""
    plan = request.plan(model=model, clean=clean, seed=seed, device=device, loading=loading)
    _require_settings(plan)
    run = RunSettings(evidence, request.model_name, request.alias, controls=request.controls)
    name, package, account = compiled(node_pools, runs_namespace(namespace))
    return ClusterJob(
        package_name=name,
        package=package,
        parameters=cluster_parameters(plan, run),
        evidence=evidence,
        service_account=service_account or account,
    )


def cluster_parameters(plan: Plan, run: RunSettings, *, where: str = "--") -> dict[str, Any]:
    """The pipeline's parameters for a cluster; ``where`` stands before the name of what is not usable.

    Raises:
        ConfigError: an address that only this machine knows, a name that MLflow does not take, or a seed that would
            come to the pods as another one.
    """
    require(plan.seed <= MAX_SEED, f"{where}seed", f"0 to {MAX_SEED} on a cluster", plan.seed)
    require_reachable(f"{where}model", plan.model, ("s3", "models"))
    of_plan = {"clean": plan.clean, "test": plan.test, "pool": plan.pool}
    for name, address in {**of_plan, "evidence": run.evidence, "controls": run.controls}.items():
        if address:
            require_reachable(f"{where}{name}", address, ("s3",))
    for probe in plan.probes:
        _require_no_file(f"{where}probe", probe)
    # The execution's own name is not known yet; any will do to check the others.
    run_settings(run.to_json(), execution="checked")
    return {**plan.arguments(), "run": run.to_json()}


def runs_namespace(option: str) -> str:
    """Where the runs will be, as the connection has it: the option's namespace, or the variable's; empty: neither."""
    return option or os.environ.get(VARIABLES["namespace"], "")


def compiled(node_pools: str, namespace: str, file: str = FILE_NAME) -> tuple[str, bytes, str]:
    """A pipeline's name, its compiled bytes, and the service account that the node pools give the run.

    Args:
        file: what it is compiled into, see :mod:`pipelines.compile`.

    Raises:
        ConfigError: the node pools are malformed, or for another namespace.
    """
    from pipelines.compile import compile_pipeline, pipeline_of

    pools = pools_for(node_pools, namespace)
    return pipeline_of(file)[0], compile_pipeline(pools, file), pools.run_service_account if pools is not None else ""


def pools_for(node_pools: str, namespace: str) -> NodePools | None:
    """The node pools of a file or of a shipped name, which are to be for ``namespace``; ``None`` where none are named.

    Raises:
        ConfigError: they are malformed, or for another namespace.
    """
    from pipelines.node_pools import read_node_pools

    pools = read_node_pools(node_pools) if node_pools else None
    if pools is not None and namespace and pools.namespace and pools.namespace != namespace:
        raise ConfigError(
            "the node pools are those of another namespace",
            expected=f"namespace {namespace}, as --namespace or {VARIABLES['namespace']} says",
            got=pools.namespace,
            hint="Correct the file, the option or the variable",
        )
    return pools


def _require_settings(plan: Plan) -> None:
    """Refuse settings of a method or the scan that the run's first step would refuse.

    Raises:
        ConfigError, PolicyError: as that step would.
    """
    # The image of the hooks has no PyTorch, and knows no method.
    if find_spec("torch") is not None:
        from components.fetch_model.step import check_plan

        check_plan(plan)


def require_reachable(name: str, address: str, schemes: tuple[str, ...]) -> None:
    """Raise ConfigError for an address that only this machine knows."""
    if split_address(address).scheme not in schemes:
        raise ConfigError(
            f"{name} is not reachable from a cluster",
            expected=" or ".join(f"{scheme}:{'//' if scheme == 's3' else '/'}…" for scheme in schemes),
            got=repr(address)[:120],
            hint="Pods do not see files of this machine; put it into the object store",
        )


def _require_no_file(name: str, probe: Mapping[str, Any]) -> None:
    """Raise ConfigError for a learned trigger: nothing takes its file into the pods."""
    if "path" in probe:
        raise ConfigError(
            f"{name}: a learned trigger cannot be measured on a cluster",
            expected="a trigger that its settings describe, without a path",
            got=repr(probe["path"])[:120],
            hint="Pods do not see its file; measure it on this machine: quarantine evaluate --probe FILE",
        )
