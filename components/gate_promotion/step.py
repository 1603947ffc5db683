"""Gate: policy and evidence in, decision out. Offline, without torch, the same inputs give the same decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components._runtime.approvals import SignedApproval
from components._runtime.decision_files import decision_bytes, replay_decision, write_decision
from components._runtime.evidence import POLICY, Clock, compose, read_evidence, read_folder
from components._runtime.plan import parse_json
from defense_core.config import to_mapping
from defense_core.errors import EvidenceMismatch
from defense_core.files import atomic_directory, sha256_bytes
from defense_core.policy import decide, parse_policy


def decide_given(
    paths: Sequence[Path], policy: str, out: Path, *, former: Path | None, approvals: Sequence[SignedApproval]
) -> dict[str, Any]:
    """Decide on what a component was given: evidence files and a policy, or the folder of a former decision.

    Args:
        paths: evidence files; an empty one is of a step that the policy did not ask for.
        policy: JSON.
        out: folder that becomes the decision.
        former: a decision that the new one takes the place of, on the same evidence and by the same policy.

    Raises:
        ConfigError: ``policy`` is no JSON.
        as :func:`gate_promotion`.
    """
    if former is not None:
        stated = parse_json((former / POLICY).read_text("utf-8"), POLICY)
        return gate_promotion(read_folder(former), stated, out, approvals=approvals, supersedes=former)
    found = [read_evidence(path) for path in paths if path.stat().st_size]
    return gate_promotion(
        {str(each["name"]): each for each in found}, parse_json(policy, "policy"), out, approvals=approvals
    )


def gate_promotion(
    evidence: Mapping[str, Mapping[str, Any]],
    policy: Mapping[str, Any],
    out: Path | None = None,
    *,
    at: str | None = None,
    approvals: Sequence[SignedApproval] = (),
    supersedes: Path | None = None,
) -> dict[str, Any]:
    """Apply ``policy`` to ``evidence``.

    Args:
        evidence: evidence mappings by name, e.g. from :func:`components._runtime.evidence.read_folder`.
        policy: what a policy file says.
        out: folder that becomes the decision with all that it rests on: one ``<name>.json`` for
            each evidence and the gate's own, ``policy.json`` and ``decision.json``; ``None``: nothing is written.
            A folder that holds something is refused: a decision is never edited, only superseded.
        at: time of the decision, ISO 8601 with a zone; ``None``: now. It stands in the decision.
        approvals: of people, whose signatures were checked.
        supersedes: folder of an earlier decision about the same artifact that this one takes the place of.

    Returns:
        Evidence ``gate``: ``results`` is the decision (``outcome``: allow, deny, unknown or observe;
        ``findings``: one a rule), ``verdict`` its verdict.

    Raises:
        PolicyError: the policy is malformed.
        EvidenceMismatch: an evidence file is damaged; an approval, or the superseded decision, is about something else.
        StorageError: ``out`` holds something.
    """
    clock = Clock.start()
    parsed = parse_policy(policy)
    former = None if supersedes is None else replay_decision(supersedes).decision
    decision = decide(
        parsed,
        evidence,
        at=at or clock.started,
        approvals=[signed.approval for signed in approvals],
        supersedes=None if former is None else sha256_bytes(decision_bytes(former)),
    )
    if former is not None and former.subject.source != decision.subject.source:
        raise EvidenceMismatch(
            f"{supersedes} is a decision about another artifact",
            expected=decision.subject.source,
            got=former.subject.source,
            hint="A decision takes the place of an earlier one about the same artifact only",
        )
    gate = compose(
        "gate",
        clock,
        inputs={
            "source": decision.subject.source,
            "model": decision.subject.model,
            "onnx": decision.subject.onnx,
            "policy": decision.policy_digest,
            "evidence": decision.evidence_digest,
        },
        outputs={"decision": sha256_bytes(decision_bytes(decision))},
        results=to_mapping(decision),
        verdict=decision.verdict,
        findings=decision.findings,
    )
    if out is not None:
        with atomic_directory(out) as folder:
            write_decision(folder, {**evidence, "gate": gate}, policy, decision, approvals)
    return gate
