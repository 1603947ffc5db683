"""Promotion: upload, register, download again and hash, decide, and only then move the alias.

=====  ============================================  ==============================================
step   what is done                                  what a kill right after it leaves
=====  ============================================  ==============================================
1      hash the release, compare with the evidence   nothing
2      upload into a folder named by its content     files that nothing points at
3      create the version, tagged ``pending``        a pending version; the next run takes it up
4      download what the registry serves, check it   the same
5      tag the decision; where the version was       a decided version; the next run goes on
       there, tag the address of this work too
6      tag whose alias it was; set it, on PASS only  a promoted version; the next run sets the tag, and the
                                                     alias where it still is with whose it was
7      tag that the alias was set                    done
=====  ============================================  ==============================================

The alias is the last thing that consumers see and is set by one request, so there is no partly
promoted model. Doing the same work again (same :class:`Identity`) comes back to the same version.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from components._runtime import registry_tags as tag
from components._runtime.evidence import DECISION
from components._runtime.mlflow_connection import MlflowConnection, mlflow_errors
from components._runtime.model_signature import SIGNATURE
from components._runtime.model_versions import (
    REASONS,
    Order,
    find_or_create,
    grew_old,
    note_origin,
    quarantine,
    require_agreement,
    same_identity,
    takes_its_place,
    version_tags,
)
from components._runtime.promotion_signature import SignatureCheck
from components._runtime.registered_files import Manifest, download_version, manifest_differences
from components._runtime.registered_names import require_usable
from components._runtime.release import (
    EVIDENCE_FOLDER,
    Identity,
    Release,
    check_release,
    model_files,
    without_evidence,
)
from components._runtime.run_election import TrackedRun
from components._runtime.version_alias import alias_before, alias_version, move_alias, wants_alias
from defense_core.config import digest
from defense_core.errors import EvidenceMismatch, EvidenceMissing, RegistryConflict, SourceNotFound
from defense_core.verdict import Verdict

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

MAX_BYTES = 16 << 30
NOBODY = SignatureCheck()


@dataclass(frozen=True)
class Promotion:
    """What the registry holds now.

    Attributes:
        name: the registered model.
        version: the version's number.
        decision: ``allow`` or ``quarantined``.
        reason: ``denied`` or ``undecided`` for a quarantined version, else empty.
        alias: the alias that was asked for.
        alias_version: the version that has the alias now; ``None`` if none has.
        alias_moved: whether this call moved it.
        alias_before: the version that had the alias before this one was given it; ``None`` if none had, or it was not.
        reused: whether an earlier run had created the version.
        identity: digest of the identity.
        evidence_digest: of the evidence in the version.
        files_digest: over names and contents of all its files, as the registry serves them.
        decision_digest: of the ``decision.json`` among them; ``None`` if there is none.
        signed: whether they verify as signed by whom promotion trusts; ``None``: they carry a signature that nobody
            was named to check; false: they carry none.
        source: where the version's files are.
    """

    name: str
    version: str
    decision: str
    reason: str
    alias: str
    alias_version: str | None
    alias_moved: bool
    alias_before: str | None
    reused: bool
    identity: str
    evidence_digest: str
    files_digest: str
    decision_digest: str | None
    signed: bool | None
    source: str

    @property
    def quarantined(self) -> bool:
        """Whether the version may not be served."""
        return self.decision == tag.QUARANTINED


def promote(
    connection: MlflowConnection,
    release: Release,
    *,
    name: str,
    run: TrackedRun,
    identity: Identity,
    verdict: Verdict,
    policy: str,
    alias: str = "champion",
    tags: Mapping[str, str] | None = None,
    description: str = "",
    renews_before: datetime | None = None,
    supersedes: str | None = None,
    signatures: SignatureCheck = NOBODY,
    decision_digest: str | None = None,
) -> Promotion:
    """Register ``release`` as a version of ``name``; move ``alias`` to it only on PASS.

    A later call with the same identity finds the version: a decided one is returned as it is, a
    pending one is completed. Only UNKNOWN, a decision that grew old, and one that the new decision names
    may be followed by another decision, which gets a version of its own, because the evidence is part of
    the version. An alias is moved once for a version: repeating old work never takes it back from a newer version.

    Args:
        run: the run that keeps the files; :func:`components._runtime.tracking.open_run`.
        verdict: the gate's decision.
        policy: the policy's name, for the tag.
        tags: further tags of the version; names of this project's own are refused.
        description: Markdown for people, see :mod:`components._runtime.model_card`; set when the version is created.
        renews_before: decisions of the same work that were made before this time are too old to count.
        supersedes: digest of the decision that this one takes the place of; a version that it refused is no conflict.
        signatures: checked on what the registry serves; checking ``release`` first is the caller's.
        decision_digest: of the ``decision.json`` that gives ``verdict``; a new version must hold it. ``None``: any.

    Raises:
        ConfigError: reserved alias, unusable name or tag, malformed digest.
        DigestMismatch: the local files are not those of the evidence; nothing is registered.
        RegistryConflict: the registered bytes are not those of the evidence (the version is tagged,
            the alias stays); or the identity was decided otherwise before, gave other bytes, or was
            registered with a signature that does not hold.
        RegistryUnavailable: MLflow does not answer; run again.
    """
    require_usable(name, alias, tags or {})
    manifest = check_release(release)
    tagged = version_tags(release, identity, policy, manifest, tags)
    order = Order(
        release,
        name,
        run,
        identity,
        verdict,
        alias,
        manifest,
        tagged,
        description,
        renews_before,
        supersedes,
        decision_digest,
    )
    with mlflow_errors(f"register {name}", connection.settings):
        version, reused = find_or_create(connection, order)
    with mlflow_errors(f"promote models:/{name}/{version.version}", connection.settings):
        served, signed = _verify(connection, version, order, signatures)
        decided = _decide(connection, version, order, served)
        if reused:
            note_origin(connection, version, order)
        moved = decided == tag.ALLOW and move_alias(connection, version, order)
        return _promotion(connection, version, order, served, signed=signed, reused=reused, moved=moved)


# -- what its bytes are ----------------------------------------------------------------


def _verify(
    connection: MlflowConnection, version: ModelVersion, order: Order, signatures: SignatureCheck
) -> tuple[Manifest, bool | None]:
    """Step 4: download what a consumer would get and check it; the digest of every file, and whether they are signed.

    Raises:
        RegistryConflict: other bytes (the version is tagged so), no good signature, or an older layout
            around the right model, which is no damage but gets no alias.
    """
    with tempfile.TemporaryDirectory(prefix="quarantine-verify-") as folder:
        got = _registered(connection, version, Path(folder))
        _compare(connection, version, order, got)
        return got, _signed(version, Path(folder), signatures)


def _compare(connection: MlflowConnection, version: ModelVersion, order: Order, got: Manifest) -> None:
    """Compare the downloaded files with the evidence."""
    what = f"models:/{version.name}/{version.version}"
    damage = manifest_differences(model_files(order.manifest), model_files(got))
    if not damage and digest(dict(got)) != version.tags.get(tag.FILES_DIGEST):
        damage = manifest_differences(order.manifest, got) or [f"the tag {tag.FILES_DIGEST} changed"]
    if damage:
        quarantine(connection, version, tag.BYTES_DIFFER)
        raise RegistryConflict(
            f"registered files of {what} are not those of the evidence",
            expected=f"ONNX {order.release.onnx_digest}, bundle {order.release.bundle_digest}",
            got="; ".join(damage[:10]),
            hint=f"It is quarantined and the alias {order.alias} was not moved; find out who changed it",
        )
    if SIGNATURE in order.manifest and SIGNATURE not in got:
        raise RegistryConflict(
            f"{what}, from the same work, was registered without a signature",
            expected="a signed version",
            got="an unsigned one",
            hint="Delete the version and run again",
        )
    layout = manifest_differences(without_evidence(order.manifest), without_evidence(got))
    if layout and wants_alias(version, order):
        raise RegistryConflict(
            f"{what} holds the right model beside other files",
            expected="the files that this release of the project writes",
            got="; ".join(layout[:10]),
            hint="Delete the version and run again",
        )


def _signed(version: ModelVersion, folder: Path, signatures: SignatureCheck) -> bool | None:
    """Whether the files are signed: an earlier run of the same work may have registered what nobody signed."""
    try:
        return signatures.of_version(folder, name=version.name)
    except (EvidenceMissing, EvidenceMismatch) as error:
        raise RegistryConflict(
            f"models:/{version.name}/{version.version}, from the same work, was registered without a good signature",
            expected=error.expected,
            got=error.got,
            hint="Find out who registered it, delete the version and run again",
        ) from error


def _registered(connection: MlflowConnection, version: ModelVersion, folder: Path) -> Manifest:
    try:
        return download_version(connection, version, folder, max_bytes=MAX_BYTES)
    except SourceNotFound:
        return {}  # its files are gone: every one of them differs


# -- decision ----------------------------------------------------------------------


def _decide(connection: MlflowConnection, version: ModelVersion, order: Order, served: Manifest) -> str:
    """Step 5: tag the decision; the decision that the version has now."""
    fresh = connection.client.get_model_version(version.name, version.version)
    if fresh.tags.get(tag.DECISION) != tag.PENDING:
        if fresh.tags.get(tag.REASON) == tag.ABANDONED:
            raise RegistryConflict(
                f"models:/{version.name}/{version.version} was taken over",
                expected="one promotion of this work at a time",
                got="another run with other evidence",
                hint="Run again",
            )
        # Another run may have decided it, or found it damaged, while its files were read.
        require_agreement(fresh, order)
        return str(fresh.tags.get(tag.DECISION))
    got = served.get(f"{EVIDENCE_FOLDER}/{DECISION}")
    if order.decision_digest not in (None, got):
        quarantine(connection, version, tag.BYTES_DIFFER)
        raise RegistryConflict(
            f"models:/{version.name}/{version.version} holds another decision than the one that was made again",
            expected=order.decision_digest,
            got=got or "no such file",
            hint=f"It is quarantined and the alias {order.alias} was not moved; find out who changed it",
        )
    if order.verdict is not Verdict.PASS:
        quarantine(connection, version, REASONS[order.verdict])
        decision = tag.QUARANTINED
    else:
        decision = tag.ALLOW
        connection.client.set_model_version_tag(version.name, version.version, tag.DECISION, decision)
    if order.verdict is not Verdict.UNKNOWN:
        _supersede(connection, version, order)
    return decision


def _supersede(connection: MlflowConnection, version: ModelVersion, order: Order) -> None:
    for other in same_identity(connection, order):
        if other.version == version.version:
            continue
        undecided = other.tags.get(tag.REASON) == tag.UNDECIDED
        replaced = undecided or grew_old(other, order) or takes_its_place(connection, other, order)
        if replaced and tag.SUPERSEDED_BY not in other.tags:
            connection.client.set_model_version_tag(other.name, other.version, tag.SUPERSEDED_BY, str(version.version))


def _promotion(
    connection: MlflowConnection,
    version: ModelVersion,
    order: Order,
    served: Manifest,
    *,
    signed: bool | None,
    reused: bool,
    moved: bool,
) -> Promotion:
    passed = order.verdict is Verdict.PASS
    return Promotion(
        name=version.name,
        version=str(version.version),
        decision=tag.ALLOW if passed else tag.QUARANTINED,
        reason="" if passed else REASONS[order.verdict],
        alias=order.alias,
        alias_version=alias_version(connection, order.name, order.alias),
        alias_moved=moved,
        alias_before=alias_before(connection, version, order.alias),
        reused=reused,
        identity=order.identity.digest,
        evidence_digest=str(version.tags.get(tag.EVIDENCE_DIGEST)),
        files_digest=digest(dict(served)),
        decision_digest=served.get(f"{EVIDENCE_FOLDER}/{DECISION}"),
        signed=signed,
        source=str(version.source),
    )
