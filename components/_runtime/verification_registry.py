"""``verify`` of a registered version: its bytes, and what the registry says about them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from components._runtime import registry_tags as tag
from components._runtime.decided_files import identity_of_decision, release_of
from components._runtime.mlflow_connection import MlflowConnection, mlflow_errors
from components._runtime.model_versions import REASONS, version_tags
from components._runtime.promotion import MAX_BYTES
from components._runtime.promotion_files import kept_promotions
from components._runtime.registered_files import RegisteredModel, resolve_model_uri
from components._runtime.signing_keys import TrustedSigner
from components._runtime.verification import Verification, signed_destination, verify_release
from components._runtime.verification_files import Check, FileFinding
from components._runtime.verification_promotion import check_promotion
from defense_core.policy import Policy
from defense_core.verdict import Verdict

if TYPE_CHECKING:
    from securesystemslib.signer import SSlibKey

RULE = "verify.registry"


def verify_registered(
    connection: MlflowConnection,
    uri: str,
    trusted: TrustedSigner,
    *,
    policy: Policy | None = None,
    approvers: Mapping[str, SSlibKey] = MappingProxyType({}),
    max_bytes: int = MAX_BYTES,
) -> Verification:
    """Download the version that ``uri`` names, verify it, and compare it with the registry's tags and statements.

    Args:
        uri: ``models:/name/3`` or ``models:/name@alias``.
        approvers: whose approvals count: public key by name.

    Raises:
        ConfigError, SourceNotFound, UnsafeArtifact, ArtifactTooLarge, RegistryUnavailable: it cannot be
            downloaded, or the trusted key is not usable.
    """
    with tempfile.TemporaryDirectory(prefix="quarantine-verify-") as scratch:
        registered = resolve_model_uri(connection, uri, Path(scratch) / "version", max_bytes=max_bytes)
        with mlflow_errors(f"look up {uri}", connection.settings):
            aliases = connection.client.get_registered_model(registered.name).aliases
        own = sorted(str(alias) for alias, number in aliases.items() if str(number) == registered.version)

        kept = kept_promotions(connection, registered)

        def compare(check: Check) -> None:
            _check_tags(check, registered)
            _check_destination(check, registered, own)
            for file, envelope in kept.items():
                check_promotion(check, envelope, file, registered)

        return verify_release(
            registered.path, trusted, policy=policy, approvers=approvers, what=registered.uri, further=compare
        )


def expected_tags(check: Check) -> dict[str, str]:
    """What the signed files demand of the version's tags."""
    replayed = check.replayed
    if replayed is None:
        return {}
    verdict = replayed.decision.verdict
    release, identity = release_of(check.folder, replayed), identity_of_decision(replayed)
    tags = version_tags(release, identity, replayed.decision.policy_name, check.hashed, None)
    tags[tag.DECISION] = tag.ALLOW if verdict is Verdict.PASS else tag.QUARANTINED
    if verdict is not Verdict.PASS:
        tags[tag.REASON] = REASONS[verdict]
    return tags


def _check_tags(check: Check, registered: RegisteredModel) -> None:
    bound = "what the signed files say"
    with check.part(RULE, bound, "The registry's tags say what the signed files say.", "tags"):
        expected = expected_tags(check)
        if not expected:
            check.differ(RULE, "tags", expected=bound, got="no decision to compare with")
        for name, value in expected.items():
            got = registered.tags.get(name)
            if name == tag.DECISION and got == tag.PENDING:
                _pending(check, registered)
            elif name in tag.SINCE_SWEEP and got is None:
                continue  # registered by an earlier release
            elif got != value:
                check.differ(RULE, f"tag {name}", expected=value, got=got if got is not None else "no such tag")
        if tag.REASON not in expected and tag.REASON in registered.tags:
            check.differ(RULE, f"tag {tag.REASON}", expected="no such tag", got=registered.tags[tag.REASON])


def _pending(check: Check, registered: RegisteredModel) -> None:
    why = f"{registered.uri} is still pending: its promotion was not finished."
    check.findings.append(FileFinding(RULE, Verdict.UNKNOWN, tag.PENDING, "a decision", why, f"tag {tag.DECISION}"))


def _check_destination(check: Check, registered: RegisteredModel, aliases: list[str]) -> None:
    destination: Mapping[str, object] = signed_destination(check)
    if check.replayed is None or not destination:
        return
    if destination["model_name"] != registered.name:
        check.differ(RULE, "name", expected=f"the model {destination['model_name']}", got=registered.name)
    if aliases and check.replayed.decision.verdict is not Verdict.PASS:
        check.differ(RULE, f"alias {', '.join(aliases)}", expected="no alias on a refused version", got=registered.uri)
