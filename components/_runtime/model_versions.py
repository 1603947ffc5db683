"""The model version that belongs to a piece of work: found, or uploaded and created."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from components._runtime import registry_tags as tag
from components._runtime.decision_files import stated_circumstances
from components._runtime.evidence import DECISION, read_evidence
from components._runtime.mlflow_connection import MlflowConnection
from components._runtime.registered_files import Manifest, download_version
from components._runtime.registry_prompts import require_versions_shown
from components._runtime.release import EVIDENCE_FOLDER, Identity, Release, evidence_digest
from components._runtime.run_election import TrackedRun
from components._runtime.small_files import MAX_EVIDENCE_BYTES, read_small
from defense_core.config import digest
from defense_core.errors import ConfigError, RegistryConflict
from defense_core.policy_time import parse_time, time_text
from defense_core.verdict import Verdict

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

REASONS = {Verdict.FAIL: tag.DENIED, Verdict.UNKNOWN: tag.UNDECIDED}


@dataclass(frozen=True)
class Order:
    """One call's wishes, checked."""

    release: Release
    name: str
    run: TrackedRun
    identity: Identity
    verdict: Verdict
    alias: str
    manifest: Manifest
    tags: Mapping[str, str]
    description: str = ""
    renews_before: datetime | None = None
    supersedes: str | None = None
    decision_digest: str | None = None


def version_tags(
    release: Release, identity: Identity, policy: str, manifest: Manifest, tags: Mapping[str, str] | None
) -> dict[str, str]:
    """The tags of a new version; set in the request that creates it, so none is ever without them."""
    return {
        **(tags or {}),
        tag.DECISION: tag.PENDING,
        tag.POLICY: policy,
        tag.SCAN: _scan(release),
        tag.IDENTITY: identity.digest,
        tag.SOURCE_DIGEST: identity.source,
        tag.ONNX_DIGEST: release.onnx_digest,
        tag.BUNDLE_DIGEST: release.bundle_digest,
        tag.EVIDENCE_DIGEST: evidence_digest(manifest),
        tag.FILES_DIGEST: digest(dict(manifest)),
        tag.POLICY_DIGEST: identity.policy,
        **_decided(release),
    }


def _decided(release: Release) -> dict[str, str]:
    """When it was decided, and which registered version it was decided about, from what is released."""
    evidence = release.folder / EVIDENCE_FOLDER
    tags = {}
    if (evidence / DECISION).is_file():
        # Decisions of schema 1 knew no time.
        at = stated_circumstances(read_small(evidence / DECISION), str(evidence / DECISION))["at"]
        tags = {tag.DECIDED_AT: str(at)} if at else {}
    if (evidence / "fetch.json").is_file():
        uri = dict(read_evidence(evidence / "fetch.json").get("results") or {}).get("uri")
        if re.fullmatch(r"models:/[^/@:]{1,250}/[0-9]{1,9}", str(uri)):
            tags[tag.ORIGIN] = str(uri)
    return tags


def _scan(release: Release) -> str:
    """The backdoor scan's verdict, from the evidence that is released."""
    path = release.folder / EVIDENCE_FOLDER / "scan.json"
    return str(read_evidence(path).get("verdict")).lower() if path.is_file() else tag.NOT_SCANNED


def find_or_create(connection: MlflowConnection, order: Order) -> tuple[ModelVersion, bool]:
    """The version of this work, and whether it was there; created (steps 2 and 3) if it was not."""
    _ensure_model(connection, order.name)
    require_versions_shown(connection, order.name)
    found = _find(connection, order)
    if found is not None:
        return found, True
    # The folder is named by its content: another attempt in the same run cannot change the bytes
    # of a version that is already registered.
    folder = "registered/" + order.tags[tag.FILES_DIGEST].removeprefix("sha256:")[:16]
    connection.client.log_artifacts(order.run.run_id, str(order.release.folder), folder)
    own = connection.client.create_model_version(
        order.name,
        source=f"{order.run.artifact_uri}/{folder}",
        run_id=order.run.run_id,
        tags=dict(order.tags),
        description=order.description or None,
    )
    # Numbers are given in order: of two processes that create at once, both see the lower one.
    first = _find(connection, order)
    if first is not None and int(first.version) < int(own.version):
        connection.client.delete_model_version(order.name, own.version)
        return first, True
    return own, False


def note_origin(connection: MlflowConnection, version: ModelVersion, order: Order) -> None:
    """Tag a version that was there with the address that this work was about: another one may have equal bytes."""
    address = order.tags.get(tag.ORIGIN)
    if address is None:
        return
    key = tag.ORIGIN_PREFIX + digest(address).removeprefix("sha256:")[:16]
    value = f"{address} {time_text(datetime.now(UTC))}"
    connection.client.set_model_version_tag(version.name, version.version, key, value)
    # A tag is no change of the model; who lists what changed would not see it.
    model = connection.client.get_registered_model(version.name)
    connection.client.update_registered_model(version.name, description=model.description or "")


def _ensure_model(connection: MlflowConnection, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        connection.client.create_registered_model(name, description=tag.MODEL_DESCRIPTION)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def same_identity(connection: MlflowConnection, order: Order) -> list[ModelVersion]:
    """All versions of this identity, lowest number first."""
    query = f"name = '{order.name}' and tags.`{tag.IDENTITY}` = '{order.identity.digest}'"
    versions: list[ModelVersion] = []
    token: str | None = None
    while True:
        page = connection.client.search_model_versions(query, max_results=200, page_token=token)
        versions.extend(page)
        token = page.token
        if not token:
            return sorted(versions, key=lambda version: int(version.version))


def _find(connection: MlflowConnection, order: Order) -> ModelVersion | None:
    """The version to go on with, if an earlier run left one.

    Raises:
        RegistryConflict: it was decided otherwise, holds other bytes or was damaged.
    """
    chosen = None
    for version in same_identity(connection, order):
        decision, reason = version.tags.get(tag.DECISION), version.tags.get(tag.REASON)
        if grew_old(version, order) or takes_its_place(connection, version, order):
            continue
        if decision == tag.PENDING:
            same = version.tags.get(tag.FILES_DIGEST) == order.tags[tag.FILES_DIGEST]
            if not same:
                # Never decided, and its evidence is not what this decision rests on.
                quarantine(connection, version, tag.ABANDONED)
            elif chosen is None:
                chosen = version
        elif decision == tag.QUARANTINED and reason == tag.ABANDONED:
            continue
        elif decision == tag.QUARANTINED and reason == tag.UNDECIDED:
            if order.verdict is Verdict.UNKNOWN and chosen is None and _same_bytes(version, order):
                chosen = version
        else:
            require_agreement(version, order)
            return version
    return chosen


def grew_old(version: ModelVersion, order: Order) -> bool:
    """Whether the decision of ``version`` is one that the order renews: made earlier than the policy permits."""
    decided, stated = version.tags.get(tag.DECISION), version.tags.get(tag.DECIDED_AT)
    final = decided == tag.ALLOW or (decided == tag.QUARANTINED and version.tags.get(tag.REASON) == tag.DENIED)
    if order.renews_before is None or not final or not stated:
        return False
    try:
        return parse_time(stated, tag.DECIDED_AT) < order.renews_before
    except ConfigError:
        return False  # somebody changed the tag; the version stays what it was


def takes_its_place(connection: MlflowConnection, version: ModelVersion, order: Order) -> bool:
    """Whether ``version`` was refused by exactly the decision that the order's own states to supersede."""
    if order.supersedes is None or version.tags.get(tag.REASON) != tag.DENIED:
        return False
    with tempfile.TemporaryDirectory(prefix="quarantine-decision-") as folder:
        manifest = download_version(
            connection, version, Path(folder), max_bytes=MAX_EVIDENCE_BYTES, part=EVIDENCE_FOLDER
        )
    return manifest.get(f"{EVIDENCE_FOLDER}/{DECISION}") == order.supersedes


def _same_bytes(version: ModelVersion, order: Order) -> bool:
    return all(version.tags.get(key) == order.tags[key] for key in (tag.ONNX_DIGEST, tag.BUNDLE_DIGEST))


def require_agreement(version: ModelVersion, order: Order) -> None:
    """Refuse a decided version that is not what the order would make of it. Raises RegistryConflict."""
    decision, reason = version.tags.get(tag.DECISION), version.tags.get(tag.REASON)
    found = (decision, reason if decision == tag.QUARANTINED else None)
    what = f"models:/{version.name}/{version.version}, from the same source, config and policy,"
    expected = (tag.ALLOW, None) if order.verdict is Verdict.PASS else (tag.QUARANTINED, REASONS[order.verdict])
    if reason == tag.BYTES_DIFFER:
        raise RegistryConflict(
            f"{what} was found damaged",
            expected="the bytes that were registered",
            got=tag.BYTES_DIFFER,
            hint="Find out who changed its files, delete the version, then run again",
        )
    if found != expected:
        raise RegistryConflict(
            f"{what} was decided otherwise",
            expected=" ".join(filter(None, expected)),
            got=" ".join(filter(None, found)) or "no decision",
            hint="A decision is final; change the configuration or the policy, or supersede it: quarantine promote",
        )
    if not _same_bytes(version, order):
        raise RegistryConflict(
            f"{what} holds another model",
            expected=f"ONNX {order.release.onnx_digest}, bundle {order.release.bundle_digest}",
            got=f"ONNX {version.tags.get(tag.ONNX_DIGEST)}, bundle {version.tags.get(tag.BUNDLE_DIGEST)}",
            hint="The work is not repeatable on this device; the registered version stays as it is",
        )


def quarantine(connection: MlflowConnection, version: ModelVersion, reason: str) -> None:
    """Mark ``version`` as not to be served, and why."""
    # The reason first: a quarantined version without one would be a riddle for the next run.
    connection.client.set_model_version_tag(version.name, version.version, tag.REASON, reason)
    connection.client.set_model_version_tag(version.name, version.version, tag.DECISION, tag.QUARANTINED)
