"""Promote: register the decided model with its evidence; the alias moves only on allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from components._runtime.bundle_files import bundle_digest
from components._runtime.decision_files import DecisionFolder, replay_decision
from components._runtime.evidence import Clock, compose
from components._runtime.journal import parent_run
from components._runtime.mlflow_connection import MlflowConnection
from components._runtime.plan import identity_of
from components._runtime.promotion import Promotion, promote
from components._runtime.release import ONNX_NAME, Identity, Release
from defense_core.config import require, to_mapping
from defense_core.errors import EvidenceMismatch, EvidenceMissing
from defense_core.files import sha256_file
from defense_core.verdict import Finding, Verdict


def promote_model(
    model: Path, onnx: Path, decision: Path, *, name: str, alias: str, connection: MlflowConnection
) -> dict[str, Any]:
    """Carry out a decision in the registry.

    The decision is made again from its policy and evidence, and the files are hashed again, before
    anything is registered. On deny and unknown the version is tagged quarantined and no alias
    moves. A policy that only observes registers nothing.

    Args:
        model: the selected bundle.
        onnx: folder that holds ``model.onnx``.
        decision: folder that the gate wrote.
        name: the registered model.
        alias: what moves to the new version on allow.

    Returns:
        Evidence ``promote``; PASS where the registry now says what the decision says.

    Raises:
        EvidenceMismatch: decision, evidence and files do not belong together; nothing is registered.
        EvidenceMissing: the decision names no model or no source.
        RegistryConflict: this work was decided otherwise before.
        RegistryUnavailable: MLflow does not answer.
    """
    clock = Clock.start()
    replayed = replay_decision(decision)
    release = _release(model, onnx, replayed)
    identity = _identity(replayed)
    if replayed.decision.outcome == "observe":
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
        )
        results = {"registered": True, "outcome": replayed.decision.outcome, **to_mapping(done)}
        finding = Finding("promote.registered", Verdict.PASS, done.version, replayed.decision.outcome, _sentence(done))
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


def _release(model: Path, onnx: Path, replayed: DecisionFolder) -> Release:
    subject = replayed.decision.subject
    if subject.model is None or subject.onnx is None or subject.source is None:
        raise EvidenceMissing(
            "the decision names no single model",
            expected="source, model and ONNX digests",
            got=to_mapping(subject),
            hint="Run the gate again",
        )
    path = Path(onnx) / ONNX_NAME
    require(path.is_file(), "onnx", f"a folder with {ONNX_NAME}", str(onnx))
    for what, expected, got in (
        ("bundle", subject.model, bundle_digest(Path(model))),
        ("ONNX file", subject.onnx, sha256_file(path)),
    ):
        if expected != got:
            raise EvidenceMismatch(
                f"the {what} is not the one that was decided on",
                expected=expected,
                got=got,
                hint="Nothing was registered",
            )
    return Release(path, Path(model), replayed.folder, onnx_digest=subject.onnx, bundle_digest=subject.model)


def _identity(replayed: DecisionFolder) -> Identity:
    fetch = replayed.evidence.get("fetch")
    if fetch is None:
        raise EvidenceMissing(
            "evidence fetch is missing", expected="the identity of the run", hint="Run the pipeline again"
        )
    identity = identity_of(fetch)
    if identity.policy != replayed.decision.policy_digest:
        raise EvidenceMismatch(
            "the decision was made by another policy than the run's",
            expected=identity.policy,
            got=replayed.decision.policy_digest,
        )
    return identity


def _sentence(done: Promotion) -> str:
    if done.quarantined:
        return f"Version {done.version} of {done.name} is quarantined ({done.reason}); {done.alias} stays where it was."
    moved = "moved to it" if done.alias_moved else f"is at version {done.alias_version}"
    return f"Version {done.version} of {done.name} is allowed; {done.alias} {moved}."
