"""What ``quarantine submit`` and ``quarantine schedule`` are given: the cluster, the plan, and where the records go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from components._runtime.plan import Plan, RunSettings, run_settings
from defense_core.config import from_mapping
from defense_core.errors import ConfigError
from pipelines import options as o
from pipelines.kfp_settings import KfpSettings, settings_from
from pipelines.yaml_files import read_mapping

_CLUSTER = "Cluster"

# Shared by both groups: it names where the runs are, and the node pools must be for the same place.
Namespace = Annotated[
    str, typer.Option(help="Namespace of the runs, on a multi-user Kubeflow.", rich_help_panel=_CLUSTER)
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
        str, typer.Option(help="File with a bearer token; or KFP_TOKEN_FILE, KFP_TOKEN.", rich_help_panel=_CLUSTER)
    ] = "",
    kube_context: Annotated[
        str, typer.Option(help="Context of the kube configuration, instead of an endpoint.", rich_help_panel=_CLUSTER)
    ] = "",
    dex_username: Annotated[
        str,
        typer.Option(
            help="Log in by dex's form; the password is in KFP_DEX_PASSWORD or the next file.", rich_help_panel=_CLUSTER
        ),
    ] = "",
    dex_password_file: Annotated[str, typer.Option(help="File with the password.", rich_help_panel=_CLUSTER)] = "",
    ca_file: Annotated[
        str, typer.Option(help="PEM file of the authorities that are trusted.", rich_help_panel=_CLUSTER)
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


def cluster_job(
    *,
    model: Annotated[str, typer.Option(help="s3://bucket/key[?versionId=…], models:/name/3 or models:/name@alias.")],
    clean: Annotated[str, typer.Option(help="Clean set, s3://…, .parquet or .npz.")],
    evidence: Annotated[str, typer.Option(help="Root of the evidence store, s3://bucket/prefix.")],
    policy: Annotated[str, typer.Option(help="strict, standard, observe, or a policy file.")] = "standard",
    methods: Annotated[
        str, typer.Option(help="Purifiers in order of preference, comma-separated.")
    ] = "tsbd,fine_tuning",
    test: Annotated[str, typer.Option(help="Test set, s3://…; default: a fifth of the clean set.")] = "",
    probe: o.Probes = [],  # noqa: B006 - typer reads the default, nothing changes it
    register: Annotated[str, typer.Option(help="Registered model that gets a new version.")] = "quarantined-model",
    alias: Annotated[str, typer.Option(help="Alias that moves on allow.")] = "champion",
    architecture: o.Architecture = "",
    architecture_args: o.ArchitectureArgs = "",
    input_size: o.InputSize = "",
    mean: o.Mean = "",
    std: o.Std = "",
    class_names: o.ClassNames = "",
    augment: o.Augment = "",
    trusted_module: o.TrustedModule = [],  # noqa: B006
    config: Annotated[str, typer.Option(help="Settings by method, a YAML file.")] = "",
    settings: Annotated[
        list[str], typer.Option("--set", help="tsbd.n=0.15; repeatable.", metavar="METHOD.KEY=VALUE")
    ] = [],  # noqa: B006
    scan_settings: o.ScanSettings = [],  # noqa: B006
    pool: Annotated[
        str, typer.Option(help="Calibration pool of the scan, s3://…; default: one that comes along.")
    ] = "",
    seed: o.Seed = 0,
    device: o.Device = "auto",
    sha256: o.Sha256 = "",
    max_bytes: o.MaxBytes = o.DEFAULT_LIMITS.max_bytes,
    load_timeout_s: o.LoadTimeout = o.DEFAULT_LIMITS.timeout_s,
    node_pools: o.NodePoolsFile = "",
    service_account: Annotated[
        str, typer.Option(help="Account of the run's pods; default: that of the node pools.", rich_help_panel=_CLUSTER)
    ] = "",
    namespace: Namespace = "",
) -> ClusterJob:
    """The options of ``quarantine run`` that make sense on a cluster, and its own."""
    spec = o.parse_spec(
        architecture=architecture,
        architecture_args=architecture_args,
        input_size=input_size,
        mean=mean,
        std=std,
        class_names=class_names,
        augment=augment,
    )
    loading = o.parse_loading(
        trusted_module=trusted_module, max_bytes=max_bytes, load_timeout_s=load_timeout_s, sha256=sha256
    )
    plan = from_mapping(
        Plan,
        {
            "model": model,
            "clean": clean,
            "policy": o.read_policy(policy),
            "spec": spec,
            "test": test,
            "probes": o.read_probes(probe),
            "methods": [name.strip() for name in methods.split(",")],
            "configs": o.parse_settings(settings, read_mapping(Path(config)) if config else {}),
            "pool": pool,
            "scan": o.parse_settings(scan_settings, option="--scan-set"),
            "seed": seed,
            "device": device,
            "loading": loading,
        },
    )
    name, package, account = compiled(node_pools, namespace)
    return ClusterJob(
        package_name=name,
        package=package,
        parameters=cluster_parameters(plan, RunSettings(evidence=evidence, model_name=register, alias=alias)),
        evidence=evidence,
        service_account=service_account or account,
    )


def cluster_parameters(plan: Plan, run: RunSettings) -> dict[str, Any]:
    """The pipeline's parameters for a cluster.

    Raises:
        ConfigError: an address that only this machine knows, or a name that MLflow does not take.
    """
    _require_reachable("--model", plan.model, ("s3", "models"))
    for option, address in (
        ("--clean", plan.clean),
        ("--test", plan.test),
        ("--pool", plan.pool),
        ("--evidence", run.evidence),
    ):
        if address:
            _require_reachable(option, address, ("s3",))
    for probe in plan.probes:
        if isinstance(probe.get("path"), str):
            _require_reachable("--probe: path", probe["path"], ("s3",))
    # The execution's own name is not known yet; any will do to check the others.
    run_settings(run.to_json(), execution="checked")
    return {**plan.arguments(), "run": run.to_json()}


def compiled(node_pools: str, namespace: str) -> tuple[str, bytes, str]:
    """The pipeline's name, its compiled bytes, and the service account that the node pools give the run.

    Raises:
        ConfigError: the node pools are malformed, or for another namespace.
    """
    from pipelines.compile import compile_pipeline
    from pipelines.node_pools import read_node_pools
    from pipelines.quarantine import PIPELINE_NAME

    pools = read_node_pools(node_pools) if node_pools else None
    if pools is not None and namespace and pools.namespace and pools.namespace != namespace:
        raise ConfigError(
            "the node pools are those of another namespace",
            expected=f"namespace {namespace}, as --namespace says",
            got=pools.namespace,
            hint="Correct the file or the option",
        )
    return PIPELINE_NAME, compile_pipeline(pools), pools.run_service_account if pools is not None else ""


def _require_reachable(option: str, address: str, schemes: tuple[str, ...]) -> None:
    if urlsplit(address).scheme not in schemes:
        raise ConfigError(
            f"{option} is not reachable from a cluster",
            expected=" or ".join(f"{scheme}:{'//' if scheme == 's3' else '/'}…" for scheme in schemes),
            got=repr(address)[:120],
            hint="Pods do not see files of this machine; put it into the object store",
        )
