"""Promote: register the decided model with its evidence; the alias moves only on allow."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from components._runtime.decided_files import identity_of_decision, release_of
from components._runtime.decision_files import DecisionFolder, decision_bytes, replay_decision
from components._runtime.evidence import Clock, compose
from components._runtime.journal import parent_run
from components._runtime.mlflow_connection import MlflowConnection
from components._runtime.outcome import TO_ATTEST
from components._runtime.promotion import Promotion, promote
from components._runtime.promotion_signature import SignatureCheck
from components._runtime.release import EVIDENCE_FOLDER, check_release
from components._runtime.signing_keys import TrustedSigner
from defense_core.config import to_mapping
from defense_core.errors import EvidenceMismatch
from defense_core.files import sha256_bytes
from defense_core.policy_time import SKEW_S, is_after, parse_time
from defense_core.verdict import Finding, Verdict

if TYPE_CHECKING:
    from securesystemslib.signer import SSlibKey


def promote_model(
    folder: Path,
    *,
    name: str,
    alias: str,
    connection: MlflowConnection,
    trusted: TrustedSigner | None = None,
    approvers: Mapping[str, SSlibKey] = MappingProxyType({}),
) -> dict[str, Any]:
    """Carry out a decision in the registry.

    The decision is made again from its policy and evidence, the signatures are checked, and the files are hashed
    again, before anything is registered. On deny and unknown the version is tagged quarantined and no alias
    moves. A policy that only observes registers nothing.

    Args:
        folder: the release that the sign step wrote; it is registered exactly as it is.
        name: the registered model.
        alias: what moves to the new version on allow.
        trusted: whose signature counts, and without which nothing passes; ``None``: nobody's, so that a policy that
            demands one lets nothing pass.
        approvers: whose approvals count: public key by name.

    Returns:
        Evidence ``promote``; PASS where the registry now says what the decision says.

    Raises:
        EvidenceMismatch, DigestMismatch: decision, evidence, files, signatures and destination do not belong
            together, or the decision is from the future; nothing is registered.
        EvidenceMissing: the decision names no model or no source, or somebody is trusted or the policy demands a
            signature, and there is none.
        ConfigError: the policy demands a signature, and nobody was named whose would count.
        RegistryConflict: this work was decided otherwise before.
        RegistryUnavailable: MLflow does not answer.
    """
    clock = Clock.start()
    replayed = replay_decision(Path(folder) / EVIDENCE_FOLDER)
    _require_past(replayed, clock)
    release = release_of(Path(folder), replayed)
    signatures = SignatureCheck(trusted, demanded=replayed.requires_signature, approvers=approvers)
    signatures.of_release(release.folder, name=name, alias=alias)
    identity = identity_of_decision(replayed)
    if replayed.decision.outcome == "observe":
        check_release(release)
        results = {"registered": False, "outcome": "observe", "identity": identity.digest}
        finding = Finding(
            "promote.registered", Verdict.PASS, None, "observe", "The policy only observes; nothing was registered."
        )
    else:
        done = promote(
            connection,
            release,
            name=name,
            run=parent_run(connection, identity),
            identity=identity,
            verdict=replayed.decision.verdict,
            policy=replayed.decision.policy_name,
            alias=alias,
            description=_card(replayed),
            renews_before=_oldest_that_counts(replayed),
            supersedes=replayed.decision.supersedes,
            signatures=signatures,
            decision_digest=sha256_bytes(decision_bytes(replayed.decision)),
        )
        results = {"registered": True, "outcome": replayed.decision.outcome, **to_mapping(done)}
        finding = Finding("promote.registered", Verdict.PASS, done.version, replayed.decision.outcome, _sentence(done))
    results[TO_ATTEST] = replayed.requires_signature
    return compose(
        "promote",
        clock,
        inputs={
            "source": identity.source,
            "model": release.bundle_digest,
            "onnx": release.onnx_digest,
            "policy": identity.policy,
        },
        results=results,
        findings=[finding],
    )


def _require_past(replayed: DecisionFolder, clock: Clock) -> None:
    # Ages and expiries count to the time of the decision: one that has not come yet was not counted at all.
    at = replayed.decision.decided_at
    if at is not None and is_after(parse_time(at, "the time of the decision"), parse_time(clock.started, "now")):
        raise EvidenceMismatch(
            "the decision is from the future",
            expected=f"at most {SKEW_S} s after {clock.started}",
            got=at,
            hint="Correct the clock of this machine or of the gate's, or decide again; nothing was registered",
        )


def _oldest_that_counts(replayed: DecisionFolder) -> datetime | None:
    """Decisions of the same work before this time are older than the policy permits; ``None``: none is too old."""
    days, at = replayed.policy.require.max_evidence_age_days, replayed.decision.decided_at
    if days is None or at is None:
        return None
    try:
        return parse_time(at, "the time of the decision") - timedelta(days=days)
    except OverflowError:  # before the first year that there is: nothing is as old
        return None


def _card(replayed: DecisionFolder) -> str:
    # Imports torch and matplotlib, which only a registration needs.
    from components._runtime.model_card import model_card
    from defense_core.report import build_report

    return model_card(build_report(replayed.evidence, decision=json.loads(replayed.decision.to_json())))


def _sentence(done: Promotion) -> str:
    if done.quarantined:
        return f"Version {done.version} of {done.name} is quarantined ({done.reason}); {done.alias} stays where it was."
    moved = "moved to it" if done.alias_moved else f"is at version {done.alias_version}"
    return f"Version {done.version} of {done.name} is allowed; {done.alias} {moved}."
