"""What ``quarantine promote`` and ``submit-promotion`` are given: the former release, approvals, and where it goes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from components._runtime.approval_texts import ApprovalTexts
from components._runtime.approvals import read_envelope
from components._runtime.plan import RunSettings, run_settings
from components._runtime.resumption import Resumption
from components._runtime.signing_keys import load_public_key
from defense_core.errors import ConfigError
from pipelines import options as o
from pipelines.cluster_options import ClusterJob, Namespace, ServiceAccount, compiled, require_reachable, runs_namespace
from pipelines.compile import PROMOTE_NAME
from pipelines.option_groups import takes


@dataclass(frozen=True)
class PromotionOrder:
    """What a promote run is asked, where the model goes on allow, and the approvers' keys, files by name."""

    request: Resumption
    model_name: str
    alias: str
    approver_files: Mapping[str, Path]


def promotion_order(
    *,
    release: Annotated[
        str, typer.Option(help="Release of the former run: models:/name/3, models:/name@alias, or its folder.")
    ],
    approval: Annotated[
        list[Path], typer.Option(help="A signed approval, from `quarantine approve`; repeatable.")
    ] = [],
    approver_key: o.ApproverKeys = [],
    public_key: Annotated[
        Path | None,
        typer.Option(help="Public key, PEM, of whoever signed the former release; default: whom promotion trusts."),
    ] = None,
    register: Annotated[
        str, typer.Option(help="Registered model that gets a new version; default: that of models:/name/3.")
    ] = "",
    alias: Annotated[str, typer.Option(help="Alias that moves on allow.")] = "champion",
) -> PromotionOrder:
    """The options of every promote run.

    Raises:
        ConfigError: a file cannot be read, a key is not usable, or no registered model is named.
        EvidenceMismatch: an approval is signed by none of the approvers.
    """
    keys = o.approver_files(approver_key)
    for path in (*keys.values(), *([public_key] if public_key is not None else [])):
        load_public_key(path)
    given = ApprovalTexts(
        tuple(read_envelope(path).decode("utf-8", "replace") for path in approval),
        {name: _pem(path) for name, path in keys.items()},
    )
    # Now, and not only in the gate, where the run would have begun.
    given.signed()
    request = Resumption(release, given, _pem(public_key) if public_key is not None else "")
    return PromotionOrder(request, register or _registered_name(release), alias, keys)


@takes(promotion_order, into="order")
def promotion_job(
    *,
    order: PromotionOrder,
    evidence: Annotated[str, typer.Option(help="Root of the evidence store, s3://bucket/prefix.")],
    node_pools: o.NodePoolsFile = "",
    service_account: ServiceAccount = "",
    namespace: Namespace = "",
) -> ClusterJob:
    """The options of a promote run on a cluster."""
    require_reachable("--release", order.request.release, ("models",))
    require_reachable("--evidence", evidence, ("s3",))
    run = RunSettings(evidence, order.model_name, order.alias)
    # The execution's own name is not known yet; any will do to check the others.
    run_settings(run.to_json(), execution="checked")
    name, package, account = compiled(node_pools, runs_namespace(namespace), PROMOTE_NAME)
    return ClusterJob(
        package_name=name,
        package=package,
        parameters={**order.request.arguments(), "run": run.to_json()},
        evidence=evidence,
        service_account=service_account or account,
    )


def _pem(path: Path) -> str:
    """A key that was read before; what people write above it need not be UTF-8."""
    return path.read_bytes().decode("utf-8", "replace")


def _registered_name(release: str) -> str:
    found = re.match(r"models:/([^/@:]+)[/@]", release)
    if found is None:
        raise ConfigError(
            "no registered model is named",
            expected="--register NAME, where --release is a folder",
            got=repr(release),
            hint="Name the model that the former run was asked to register",
        )
    return found[1]
