"""What a registered version's evidence says, and whether that covers an alias on it.

Tags are hints. Whether a version may be served is read from its evidence: the decision is made again
from it, and every tag is compared with it. With a trusted key the whole version is verified, every byte
of the model included; without one, whoever may write files beside the registry can forge evidence.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from components._runtime import registry_tags as tag
from components._runtime.decision_files import DecisionFolder, replay_decision
from components._runtime.mlflow_connection import MlflowConnection, mlflow_errors
from components._runtime.registered_files import Manifest, download_version
from components._runtime.release import EVIDENCE_FOLDER, evidence_digest
from components._runtime.small_files import MAX_EVIDENCE_BYTES
from defense_core.errors import (
    AccessDenied,
    ArtifactTooLarge,
    ConfigError,
    EvidenceMismatch,
    EvidenceMissing,
    PolicyError,
    QuarantineError,
    RegistryConflict,
    RegistryUnavailable,
    SourceNotFound,
    UnsafeArtifact,
)
from defense_core.verdict import Verdict

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from securesystemslib.signer import SSlibKey

    from components._runtime.signing_keys import TrustedSigner

UNREADABLE = (
    SourceNotFound,
    EvidenceMissing,
    EvidenceMismatch,
    PolicyError,
    UnsafeArtifact,
    ArtifactTooLarge,
    RegistryConflict,
    ConfigError,
)
"""What is wrong with a version rather than with the registry."""

logger = logging.getLogger("quarantine")

Gap = Literal["", "unknown", "gone", "no_decision", "not_allowed", "superseded", "other_policy", "not_proven"]


@dataclass(frozen=True)
class RegisteredDecision:
    """A decision, made again from the evidence that lies in a version.

    Attributes:
        folder: the decision and its evidence, as values; its files are gone.
        problems: a sentence for each tag that says something else than the evidence.
    """

    folder: DecisionFolder
    problems: tuple[str, ...]

    @property
    def origin(self) -> str:
        """Where the source was read from; empty where the evidence does not say."""
        return str(dict(self.folder.evidence.get("fetch", {}).get("results") or {}).get("uri", ""))


@dataclass(frozen=True)
class Coverage:
    """Whether an allow decision covers a version.

    Attributes:
        gap: why not, one of a few words; empty: it is covered; ``unknown``: that could not be found out.
        why: the same as a sentence.
    """

    gap: Gap
    why: str

    @property
    def covered(self) -> bool:
        """Whether it may have an alias."""
        return not self.gap


def registered_decision(connection: MlflowConnection, version: ModelVersion) -> RegisteredDecision:
    """Download the evidence of ``version`` and make its decision again.

    Raises:
        one of :data:`UNREADABLE`: there is none, or it does not hold.
        RegistryUnavailable, AccessDenied: MLflow or its artifact store does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="quarantine-evidence-") as scratch:
        folder = Path(scratch)
        manifest = download_version(connection, version, folder, max_bytes=MAX_EVIDENCE_BYTES, part=EVIDENCE_FOLDER)
        replayed = replay_decision(folder / EVIDENCE_FOLDER)
    return RegisteredDecision(replayed, tuple(tag_differences(version.tags, replayed, manifest)))


def tag_differences(tags: Mapping[str, str], replayed: DecisionFolder, manifest: Manifest) -> Iterator[str]:
    """A sentence for each tag that says something else than the evidence."""
    subject = replayed.decision.subject
    expected = {
        tag.DECISION: tag.ALLOW if replayed.decision.verdict is Verdict.PASS else tag.QUARANTINED,
        tag.POLICY: replayed.decision.policy_name,
        tag.SOURCE_DIGEST: subject.source,
        tag.BUNDLE_DIGEST: subject.model,
        tag.ONNX_DIGEST: subject.onnx,
        tag.EVIDENCE_DIGEST: evidence_digest(manifest),
    }
    for name, value in expected.items():
        if tags.get(name) != value:
            yield f"Its tag {name} says {tags.get(name, 'nothing')}, its evidence says {value}."


def read_version(connection: MlflowConnection, name: str, number: int | str) -> ModelVersion | None:
    """A version as it is now; ``None``: it does not exist. Raises RegistryUnavailable, AccessDenied."""
    try:
        with mlflow_errors(f"look up models:/{name}/{number}", connection.settings):
            return connection.client.get_model_version(name, str(number))
    except SourceNotFound:
        return None


def coverage(
    connection: MlflowConnection,
    version: ModelVersion | None,
    *,
    policies: Collection[str],
    trusted: TrustedSigner | None = None,
    approvers: Mapping[str, SSlibKey] = MappingProxyType({}),
) -> Coverage:
    """Whether an allow decision by one of ``policies`` covers ``version``.

    Args:
        version: as it is now; ``None``: it does not exist.
        policies: digests of the policies whose decisions count.
        trusted: whose signature the version must have; ``None``: signatures and model files are not looked at.
        approvers: with ``trusted``, whose approvals count: public key by name. Without any, what rests on an approval
            is ``unknown``.

    Raises:
        RegistryUnavailable, AccessDenied: MLflow does not answer.
    """
    if version is None:
        return Coverage("gone", "The version does not exist.")
    stated = _by_tags(version.tags)
    if not stated.covered:
        return stated
    try:
        found = _by_evidence(registered_decision(connection, version), policies)
        if found.covered and trusted is not None:
            found = _verified(connection, version, trusted, approvers)
    except (AccessDenied, RegistryUnavailable) as error:
        # Credentials that expired must not look like a fleet without evidence; and one version whose files are
        # out of reach must not hide all others, unless it is MLflow itself that went away.
        read_version(connection, version.name, version.version)
        found = Coverage("unknown", f"Its evidence cannot be read: {error}")
    except UNREADABLE as error:
        found = Coverage("not_proven", f"Its tag says allow and its evidence does not hold: {error}")
    except QuarantineError:
        raise
    except Exception as error:
        # An error that nobody foresaw, of malformed evidence or a store's client, is of this version alone.
        logger.exception("models:/%s/%s cannot be judged", version.name, version.version)
        found = Coverage("unknown", f"Its evidence cannot be judged: {type(error).__name__}: {error}"[:500])
    return found


def _by_evidence(found: RegisteredDecision, policies: Collection[str]) -> Coverage:
    decision = found.folder.decision
    if not decision.promotes:
        return Coverage("not_allowed", f"Its evidence says {decision.outcome}.")
    if decision.policy_digest not in policies:
        return Coverage("other_policy", f"It was allowed by {decision.policy_name}, {decision.policy_digest[:19]}….")
    return Coverage("not_proven", found.problems[0]) if found.problems else Coverage("", "Allowed.")


def _by_tags(tags: Mapping[str, str]) -> Coverage:
    decision = tags.get(tag.DECISION)
    if decision is None:
        return Coverage("no_decision", "It never went through quarantine.")
    if decision != tag.ALLOW:
        return Coverage("not_allowed", f"It is {decision} {tags.get(tag.REASON, '')}".rstrip() + ".")
    if tag.SUPERSEDED_BY in tags:
        return Coverage("superseded", f"Version {tags[tag.SUPERSEDED_BY]} has the later decision.")
    return Coverage("", "Its tags say allow.")


def _verified(
    connection: MlflowConnection, version: ModelVersion, trusted: TrustedSigner, approvers: Mapping[str, SSlibKey]
) -> Coverage:
    # Signature checks import far more than everything else here.
    from components._runtime.verification_registry import verify_registered

    try:
        trusted.check()
    except ConfigError as error:
        # Its secret was replaced while the sweep ran: that says nothing about the version.
        return Coverage("unknown", f"Its signature cannot be checked: {error}")
    uri = f"models:/{version.name}/{version.version}"
    verified = verify_registered(connection, uri, trusted, approvers=approvers)
    if verified.verdict is Verdict.PASS:
        return Coverage("", "Verified and allowed.")
    first = next(each for each in verified.findings if each.verdict is verified.verdict)
    # What could not be checked is no proof of damage: nobody may lose an alias for it.
    return Coverage("unknown" if verified.verdict is Verdict.UNKNOWN else "not_proven", first.why)
