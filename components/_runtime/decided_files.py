"""What a decision is about, as files: the release that it speaks of, and the identity of the work."""

from __future__ import annotations

from pathlib import Path

from components._runtime.decision_files import DecisionFolder
from components._runtime.plan import identity_of
from components._runtime.release import Identity, Release
from defense_core.config import to_mapping
from defense_core.errors import EvidenceMismatch, EvidenceMissing


def release_of(folder: Path, replayed: DecisionFolder) -> Release:
    """``folder`` as the release that the decision speaks of; its files are not looked at.

    Raises:
        EvidenceMissing: the decision names no single model.
    """
    subject = replayed.decision.subject
    if subject.model is None or subject.onnx is None or subject.source is None:
        raise EvidenceMissing(
            "the decision names no single model",
            expected="source, model and ONNX digests",
            got=to_mapping(subject),
            hint="Run the gate again",
        )
    return Release(Path(folder), onnx_digest=subject.onnx, bundle_digest=subject.model)


def identity_of_decision(replayed: DecisionFolder) -> Identity:
    """Source, configuration and policy of the work.

    Raises:
        EvidenceMissing: there is no evidence of fetch.
        EvidenceMismatch: it was decided by another policy than the run's.
    """
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
