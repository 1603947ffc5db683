"""Gate: policy and evidence in, decision out. Offline, without torch, the same inputs give the same decision."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components._runtime.decision_files import write_decision
from components._runtime.evidence import Clock, compose
from defense_core.config import to_mapping
from defense_core.files import atomic_directory
from defense_core.policy import decide, parse_policy


def gate_promotion(
    evidence: Mapping[str, Mapping[str, Any]], policy: Mapping[str, Any], out: Path | None = None
) -> dict[str, Any]:
    """Apply ``policy`` to ``evidence``.

    Args:
        evidence: evidence mappings by name, e.g. from :func:`components._runtime.evidence.read_folder`.
        policy: what a policy file says.
        out: folder that becomes the decision with all that it rests on: one ``<name>.json`` for
            each evidence, ``policy.json`` and ``decision.json``; ``None``: nothing is written.

    Returns:
        Evidence ``gate``: ``results`` is the decision (``outcome``: allow, deny, unknown or observe;
        ``findings``: one a rule), ``verdict`` its verdict.

    Raises:
        PolicyError: the policy is malformed.
        EvidenceMismatch: an evidence file is damaged.
    """
    clock = Clock.start()
    parsed = parse_policy(policy)
    decision = decide(parsed, evidence)
    if out is not None:
        with atomic_directory(out) as folder:
            write_decision(folder, evidence, policy, decision)
    return compose(
        "gate",
        clock,
        inputs={
            "source": decision.subject.source,
            "model": decision.subject.model,
            "onnx": decision.subject.onnx,
            "policy": decision.policy_digest,
            "evidence": decision.evidence_digest,
        },
        results=to_mapping(decision),
        verdict=decision.verdict,
        findings=decision.findings,
    )
